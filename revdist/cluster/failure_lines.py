"""An error as lines for a person: at most five, what went wrong first, the remedy last."""

from __future__ import annotations

from revdist.errors import RevdistError

MAX_LINES = 5


def failure_lines(error: BaseException) -> list[str]:
    """What, value, limit and remedy of an error, a line each, `MAX_LINES` at most.

    A failed run says first which rank failed and on which host. Clauses that an error joins with
    semicolons, several wrong keys for example, become lines of their own.
    """
    if not isinstance(error, RevdistError):
        return [
            f"{type(error).__name__}: {_first_line(error)}",
            "this is a bug in revdist: `revdist --traceback COMMAND ...` shows where",
        ]
    clauses = [clause.strip() for clause in str(error).replace("\n", "; ").split("; ") if clause.strip()]
    where = _where(error)
    lines = [f"{where}: {clauses[0]}" if where and clauses else where or (clauses or [type(error).__name__])[0]]
    lines += clauses[1:]
    told = str(error)
    for fact in ("cause", "remedy"):
        value = error.facts.get(fact)
        if value and str(value) not in told:
            lines.append(f"{fact}: {value}")
    return _limit(lines)


def _where(error: RevdistError) -> str:
    """`rank 1 on host-b`, unless the message says it already."""
    rank, host = error.facts.get("rank"), error.facts.get("host")
    if rank is None or f"rank {rank}" in str(error):
        return ""
    return f"rank {rank} on {host}" if host else f"rank {rank}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def _limit(lines: list[str]) -> list[str]:
    """Drop from the middle: the first lines name the failure, the last one the remedy."""
    if len(lines) <= MAX_LINES:
        return lines
    hidden = len(lines) - MAX_LINES + 1
    return [*lines[: MAX_LINES - 2], f"... and {hidden} more", lines[-1]]
