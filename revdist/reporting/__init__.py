"""What a person looks at: the live view, tables, figures and the HTML report.

Nothing is imported here, so that the command line starts fast; matplotlib is only imported by the
modules that draw.
"""
