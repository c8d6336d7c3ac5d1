/* The ledger of one CPU device: a small file, mapped by every process that uses the device.
 *
 * Plain C, so that the allocator (C++), the tests' driver library (C) and ledger.py (ctypes)
 * share one layout. Change it only together with ledger.py, and raise REVDIST_LEDGER_VERSION.
 *
 * There is no total anywhere: what is used is the sum of the slots. A process that dies at any
 * instruction therefore leaves nothing to repair but its own slot, and a process that is stopped
 * blocks nobody, since no lock is ever held.
 */
#ifndef REVDIST_LEDGER_H
#define REVDIST_LEDGER_H

#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define REVDIST_LEDGER_MAGIC 0x5245474445564552ull /* "REVEDGER" in memory order */
#define REVDIST_LEDGER_VERSION 1u
#define REVDIST_NUM_SLOTS 128u
#define REVDIST_PID_BITS 22 /* Linux never hands out a pid of 2^22 or more */

/* One process. Zero `owner` means free; `current_bytes` of a free slot is zero. */
typedef struct {
  uint64_t owner;         /* start time of the process << REVDIST_PID_BITS | its pid */
  uint64_t pid_namespace; /* inode of its pid namespace: elsewhere its pid says nothing */
  uint64_t current_bytes;
  uint64_t peak_bytes;
  uint64_t unenforced; /* 1: charged by hand, from resident memory; may exceed the capacity */
  char name[88];
} revdist_slot;

typedef struct {
  uint64_t magic;
  uint32_t version;
  uint32_t num_slots;
  uint64_t capacity_bytes;
  uint64_t num_used_slots; /* slots ever used: those from here on are zero */
  char uuid[64];
  char name[64];
  char reserved[96];
  revdist_slot slots[REVDIST_NUM_SLOTS];
} revdist_ledger;

static inline uint64_t revdist_load(const uint64_t *value) { return __atomic_load_n(value, __ATOMIC_SEQ_CST); }

static inline uint64_t revdist_num_used_slots(const revdist_ledger *ledger) {
  uint64_t num_slots = revdist_load(&ledger->num_used_slots);
  return num_slots < REVDIST_NUM_SLOTS ? num_slots : REVDIST_NUM_SLOTS;
}

/* Bytes charged by all processes, the dead included. */
static inline uint64_t revdist_used_bytes(const revdist_ledger *ledger) {
  uint64_t used = 0, num_slots = revdist_num_used_slots(ledger);
  for (uint64_t i = 0; i < num_slots; ++i) used += revdist_load(&ledger->slots[i].current_bytes);
  return used;
}

static inline int revdist_owner_pid(uint64_t owner) { return (int)(owner & ((1ull << REVDIST_PID_BITS) - 1)); }

static inline uint64_t revdist_pid_namespace(void) {
  struct stat status;
  return stat("/proc/self/ns/pid", &status) == 0 ? (uint64_t)status.st_ino : 0;
}

/* The identity of a living process, 0 if there is none. A zombie has given its memory back: it counts as dead. */
static inline uint64_t revdist_process_identity(int pid) {
  char path[32], line[1024];
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  FILE *file = fopen(path, "re");
  if (!file) return 0;
  size_t length = fread(line, 1, sizeof line - 1, file);
  fclose(file);
  line[length] = 0;
  const char *fields = strrchr(line, ')'); /* the name before it may hold anything */
  char state = 0;
  unsigned long long start_time = 0;
  if (!fields || sscanf(fields + 1, " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu",
                        &state, &start_time) != 2)
    return 0;
  if (state == 'Z' || state == 'X' || state == 'x') return 0;
  return ((uint64_t)start_time << REVDIST_PID_BITS) | (uint64_t)pid;
}

/* Whether the slot's process is known to be gone. One in another pid namespace is taken to live. */
static inline int revdist_slot_is_dead(const revdist_slot *slot, uint64_t pid_namespace) {
  uint64_t owner = revdist_load(&slot->owner);
  if (owner == 0 || slot->pid_namespace != pid_namespace) return 0;
  return revdist_process_identity(revdist_owner_pid(owner)) != owner;
}

#endif
