/* A stand-in for the NVIDIA driver's library: libnvidia-ml.so.1 as nvidia-ml-py and Ray load it.
 *
 * Its GPUs are the CPU devices of revdist: memory and processes are read from their ledgers. What there is and what
 * is broken stands in the file that FAKE_NVML_CONTROL names, read again at every call:
 *
 *     driver <version>
 *     gpu <uuid> <ledger> <name ...>
 *     mig <uuid> <uuid of its gpu> <ledger> <name ...>     the gpu is then split by MIG
 *     fault <uuid or *> <NVML error code> [<function>]     every call about the device, or that one, fails
 *     xid <uuid of a gpu> <number>                         an error event; each watcher sees each line once
 *
 * FAKE_NVML_TRACE names a file that gets a line for every call: the function and the device.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include "control.h"
#include "ledger.h"

#define XID_EVENT 8ull
#define MEMORY_V2 0x02000028u

typedef struct {
  char gpus[MAX_DEVICES][96];
  int num_gpus, num_seen;
} event_set;

typedef struct {
  unsigned long long total, free, used;
} memory_v1;

typedef struct {
  unsigned version;
  unsigned long long total, reserved, free, used;
} memory_v2;

typedef struct {
  unsigned pid;
  unsigned long long used;
  unsigned gpu_instance, compute_instance;
} process_info;

typedef struct {
  device *gpu;
  unsigned long long type, data;
  unsigned gpu_instance, compute_instance;
} event_data;

typedef struct {
  char legacy_bus_id[16];
  unsigned domain, bus, device, pci_device, pci_subsystem;
  char bus_id[32];
} pci_info;

/* ---- the library itself ---- */

result nvmlInitWithFlags(unsigned flags) {
  ENTER("*");
  (void)flags;
  ++initialized; /* as the real one, it counts */
  return SUCCESS;
}

result nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

result nvmlShutdown(void) {
  ENTER("*");
  --initialized;
  return SUCCESS;
}

static result copy(char *target, unsigned length, const char *source) {
  if (strlen(source) >= length) return INSUFFICIENT_SIZE;
  strcpy(target, source);
  return SUCCESS;
}

const char *nvmlErrorString(result code) {
  static const char *const texts[] = {
      "Success", "Uninitialized", "Invalid Argument", "Not Supported", "Insufficient Permissions", "Already Initialized",
      "Not Found", "Insufficient Size", "Insufficient External Power", "Driver Not Loaded", "Timeout",
      "Interrupt Request Issue", "NVML Shared Library Not Found", "Function Not Found", "Corrupted infoROM",
      "GPU is lost", "GPU requires restart", "The operating system has blocked the request.",
      "RM has detected an NVML/RM version mismatch."};
  return code >= 0 && code < (int)(sizeof texts / sizeof *texts) ? texts[code] : "Unknown Error";
}

result nvmlSystemGetDriverVersion(char *version, unsigned length) {
  ENTER("*");
  return copy(version, length, driver);
}

result nvmlSystemGetNVMLVersion(char *version, unsigned length) {
  ENTER("*");
  return copy(version, length, "12.550.54.15");
}

result nvmlSystemGetCudaDriverVersion_v2(int *version) {
  ENTER("*");
  *version = 12040;
  return SUCCESS;
}

result nvmlSystemGetProcessName(unsigned pid, char *name, unsigned length) {
  ENTER("*");
  char path[32], line[256] = {0};
  snprintf(path, sizeof path, "/proc/%u/comm", pid);
  FILE *file = fopen(path, "re");
  if (!file) return NOT_FOUND;
  if (!fgets(line, sizeof line, file)) line[0] = 0;
  fclose(file);
  line[strcspn(line, "\n")] = 0;
  return copy(name, length, line);
}

/* ---- devices ---- */

result nvmlDeviceGetCount_v2(unsigned *count) {
  ENTER("*");
  *count = 0;
  for (int i = 0; i < num_devices; ++i) *count += is_gpu(&devices[i]);
  return SUCCESS;
}

result nvmlDeviceGetHandleByIndex_v2(unsigned index, device **handle) {
  ENTER("*");
  for (int i = 0; i < num_devices; ++i) {
    if (!is_gpu(&devices[i]) || index-- > 0) continue;
    *handle = &devices[i];
    return enter_device(__func__, *handle);
  }
  return INVALID_ARGUMENT;
}

result nvmlDeviceGetHandleByUUID(const char *uuid, device **handle) {
  ENTER(uuid);
  device *found = find(uuid);
  if (!found || !found->present) return NOT_FOUND;
  *handle = found;
  return SUCCESS;
}

result nvmlDeviceGetIndex(const device *about, unsigned *index) {
  ENTER_DEVICE(about);
  *index = index_of(about);
  return SUCCESS;
}

result nvmlDeviceGetUUID(const device *about, char *uuid, unsigned length) {
  ENTER_DEVICE(about);
  return copy(uuid, length, about->uuid);
}

result nvmlDeviceGetName(const device *about, char *name, unsigned length) {
  ENTER_DEVICE(about);
  return copy(name, length, about->name);
}

result nvmlDeviceGetPciInfo_v3(const device *about, pci_info *info) {
  ENTER_DEVICE(about);
  memset(info, 0, sizeof *info);
  info->bus = index_of(about) + 1;
  snprintf(info->legacy_bus_id, sizeof info->legacy_bus_id, "0000:%02X:00.0", info->bus);
  snprintf(info->bus_id, sizeof info->bus_id, "00000000:%02X:00.0", info->bus);
  return SUCCESS;
}

result nvmlDeviceGetMigMode(const device *about, unsigned *current, unsigned *pending) {
  ENTER_DEVICE(about);
  *current = *pending = is_split(about);
  return SUCCESS;
}

result nvmlDeviceGetMaxMigDeviceCount(const device *about, unsigned *count) {
  ENTER_DEVICE(about);
  *count = 7; /* places, most of them empty */
  return SUCCESS;
}

result nvmlDeviceGetMigDeviceHandleByIndex(const device *about, unsigned index, device **handle) {
  ENTER_DEVICE(about);
  unsigned place = 1; /* the first place stays empty */
  for (int i = 0; i < num_devices; ++i) {
    if (!devices[i].present || strcmp(devices[i].parent, about->uuid) || place++ != index) continue;
    *handle = &devices[i];
    return SUCCESS;
  }
  return NOT_FOUND;
}

result nvmlDeviceGetDeviceHandleFromMigDeviceHandle(const device *about, device **handle) {
  ENTER_DEVICE(about);
  device *gpu = find(about->parent);
  if (!gpu) return INVALID_ARGUMENT;
  *handle = gpu;
  return SUCCESS;
}

result nvmlDeviceIsMigDeviceHandle(const device *about, unsigned *is_mig) {
  ENTER_DEVICE(about);
  *is_mig = about->parent[0] != 0;
  return SUCCESS;
}

/* ---- memory and processes, from the ledger ---- */

static revdist_ledger *map_ledger(const device *about) {
  int file = open(about->ledger, O_RDONLY | O_CLOEXEC);
  if (file < 0) return NULL;
  void *memory = mmap(NULL, sizeof(revdist_ledger), PROT_READ, MAP_SHARED, file, 0);
  close(file);
  return memory == MAP_FAILED ? NULL : memory;
}

static int holds_memory(const revdist_slot *slot, uint64_t pid_namespace) {
  return revdist_load(&slot->owner) && revdist_load(&slot->current_bytes) && !revdist_slot_is_dead(slot, pid_namespace);
}

static result read_memory(const device *about, unsigned long long *total, unsigned long long *used) {
  if (is_split(about)) return NOT_SUPPORTED; /* who asks a split GPU has made a mistake */
  revdist_ledger *ledger = map_ledger(about);
  if (!ledger) return UNKNOWN;
  uint64_t here = revdist_pid_namespace();
  *total = revdist_load(&ledger->capacity_bytes);
  *used = 0;
  for (uint64_t i = 0; i < revdist_num_used_slots(ledger); ++i)
    if (holds_memory(&ledger->slots[i], here)) *used += revdist_load(&ledger->slots[i].current_bytes);
  munmap(ledger, sizeof *ledger);
  return SUCCESS;
}

result nvmlDeviceGetMemoryInfo(const device *about, memory_v1 *memory) {
  ENTER_DEVICE(about);
  result outcome = read_memory(about, &memory->total, &memory->used);
  memory->free = memory->total > memory->used ? memory->total - memory->used : 0;
  return outcome;
}

result nvmlDeviceGetMemoryInfo_v2(const device *about, memory_v2 *memory) {
  ENTER_DEVICE(about);
  if (memory->version != MEMORY_V2) return VERSION_MISMATCH;
  result outcome = read_memory(about, &memory->total, &memory->used);
  memory->reserved = 0;
  memory->free = memory->total > memory->used ? memory->total - memory->used : 0;
  return outcome;
}

result nvmlDeviceGetComputeRunningProcesses_v3(const device *about, unsigned *count, process_info *found) {
  ENTER_DEVICE(about);
  revdist_ledger *ledger = map_ledger(about);
  if (!ledger) return UNKNOWN;
  uint64_t here = revdist_pid_namespace();
  unsigned num_found = 0;
  for (uint64_t i = 0; i < revdist_num_used_slots(ledger); ++i) {
    const revdist_slot *slot = &ledger->slots[i];
    if (!holds_memory(slot, here)) continue;
    if (found && num_found < *count)
      found[num_found] = (process_info){(unsigned)revdist_owner_pid(slot->owner), slot->current_bytes, ~0u, ~0u};
    ++num_found;
  }
  munmap(ledger, sizeof *ledger);
  result outcome = num_found > (found ? *count : 0) ? INSUFFICIENT_SIZE : SUCCESS;
  *count = num_found;
  return outcome;
}

result nvmlDeviceGetComputeRunningProcesses_v2(const device *about, unsigned *count, process_info *found) {
  return nvmlDeviceGetComputeRunningProcesses_v3(about, count, found);
}

result nvmlDeviceGetGraphicsRunningProcesses_v3(const device *about, unsigned *count, process_info *found) {
  ENTER_DEVICE(about);
  (void)found;
  *count = 0;
  return SUCCESS;
}

result nvmlDeviceGetUtilizationRates(const device *about, unsigned utilization[2]) {
  ENTER_DEVICE(about);
  utilization[0] = utilization[1] = 0;
  return SUCCESS;
}

/* ---- events ---- */

result nvmlEventSetCreate(event_set **set) {
  ENTER("*");
  *set = calloc(1, sizeof **set);
  (*set)->num_seen = num_events;
  return SUCCESS;
}

result nvmlEventSetFree(event_set *set) {
  free(set);
  return SUCCESS;
}

result nvmlDeviceGetSupportedEventTypes(const device *about, unsigned long long *types) {
  ENTER_DEVICE(about);
  *types = XID_EVENT;
  return SUCCESS;
}

result nvmlDeviceRegisterEvents(const device *about, unsigned long long types, event_set *set) {
  ENTER_DEVICE(about);
  if (about->parent[0] || !(types & XID_EVENT) || set->num_gpus == MAX_DEVICES) return INVALID_ARGUMENT;
  strcpy(set->gpus[set->num_gpus++], about->uuid);
  return SUCCESS;
}

static result take_event(event_set *set, event_data *data) {
  ONE_AT_A_TIME;
  result outcome = enter("nvmlEventSetWait_v2", "*");
  if (outcome != SUCCESS) return outcome;
  while (set->num_seen < num_events) {
    const event *happened = &events[set->num_seen++];
    for (int i = 0; i < set->num_gpus; ++i) {
      if (strcmp(set->gpus[i], happened->uuid)) continue;
      *data = (event_data){find(happened->uuid), XID_EVENT, happened->number, ~0u, ~0u};
      return SUCCESS;
    }
  }
  return TIMEOUT;
}

result nvmlEventSetWait_v2(event_set *set, event_data *data, unsigned timeout_ms) {
  for (unsigned waited_ms = 0;; waited_ms += 5) {
    result outcome = take_event(set, data);
    if (outcome != TIMEOUT || waited_ms >= timeout_ms) return outcome;
    nanosleep(&(struct timespec){0, 5000000}, NULL);
  }
}
