/* What the fake driver has and what is broken on it, read from its control file. */
#ifndef FAKE_NVML_CONTROL_H
#define FAKE_NVML_CONTROL_H

#define MAX_DEVICES 64
#define MAX_EVENTS 64

typedef int result; /* NVML's codes */
enum {
  SUCCESS = 0,
  UNINITIALIZED = 1,
  INVALID_ARGUMENT = 2,
  NOT_SUPPORTED = 3,
  NOT_FOUND = 6,
  INSUFFICIENT_SIZE = 7,
  TIMEOUT = 10,
  VERSION_MISMATCH = 25,
  UNKNOWN = 999,
};

/* A GPU or MIG instance. A handle, as real ones do, stays valid: devices are never forgotten, and found by UUID. */
typedef struct {
  char uuid[96], parent[96], ledger[512], name[96];
  int present; /* whether the control file still lists it */
} device;

typedef struct {
  char uuid[96];
  unsigned long long number;
} event;

extern device devices[MAX_DEVICES];
extern event events[MAX_EVENTS];
extern int num_devices, num_events, initialized;
extern char driver[64];

device *find(const char *uuid);
int is_gpu(const device *candidate);
int is_split(const device *gpu);
unsigned index_of(const device *gpu);

/* What every function does first: reads the control file, and fails if that says so. `uuid` may be "*". */
result enter(const char *function, const char *uuid);
result enter_device(const char *function, const device *about);

/* One call at a time: the state above is shared. The lock ends with the scope it is declared in. */
void lock_calls(void);
void unlock_calls(int *unused);
#define ONE_AT_A_TIME                                            \
  __attribute__((cleanup(unlock_calls))) int locked_ = (lock_calls(), 0); \
  (void)locked_

#define ENTER(uuid)                           \
  ONE_AT_A_TIME;                              \
  result outcome_ = enter(__func__, uuid);    \
  if (outcome_ != SUCCESS) return outcome_

#define ENTER_DEVICE(about)                            \
  ONE_AT_A_TIME;                                       \
  result outcome_ = enter_device(__func__, about);     \
  if (outcome_ != SUCCESS) return outcome_

#endif
