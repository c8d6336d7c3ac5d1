// The allocator behind a CPU device: charges each CPU tensor storage to the device's ledger.
//
// It hands out torch's own allocations, so alignment and the profiler's memory events stay what they are, and keeps
// what is freed for the next step that wants it.
// What a storage was charged lies in a table beside it, not in a header before it: oneDNN frees
// buffers through the allocator that is current *then*, including those it took before ours came.
//
// Only c10 headers are included: torch/extension.h takes forty seconds to compile, this file about one and a half.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <mutex>
#include <string>
#include <unordered_map>

#include "kept_blocks.h"
#include "ledger.h"

namespace {

using ShortageCallback = int64_t (*)(int64_t missing_bytes);

struct Account {
  revdist_ledger* ledger;
  revdist_slot* slot;
};

struct Charge {
  revdist_slot* slot;
  uint64_t num_bytes;
};

// Charges by address, in shards so that threads rarely meet.
struct Shard {
  std::mutex mutex;
  std::unordered_map<void*, Charge> charges;
};

constexpr size_t kNumShards = 64;
constexpr int kMaxBackOffs = 256;

// Accounts and shards are never freed: storages outlive interpreters and deactivation.
std::atomic<const Account*> active_account{nullptr};
std::atomic<ShortageCallback> shortage_callback{nullptr};
thread_local bool inside_callback = false;
c10::Allocator* original = nullptr;
c10::DeleterFnPtr original_delete = nullptr;
auto& shards = *new std::array<Shard, kNumShards>;
auto& kept_blocks = *new KeptBlocks(c10::free_cpu);
// Most bytes that storages of this process have had at once. With what is kept they never have a quarter more.
std::atomic<uint64_t> most_bytes_at_once{0};
bool keeps_blocks = false;

Shard& shard_of(void* data) { return shards[(reinterpret_cast<uintptr_t>(data) >> 6) % kNumShards]; }

uint64_t add(uint64_t& value, uint64_t amount) { return __atomic_add_fetch(&value, amount, __ATOMIC_SEQ_CST); }

void subtract(uint64_t& value, uint64_t amount) { __atomic_sub_fetch(&value, amount, __ATOMIC_SEQ_CST); }

void raise_to(uint64_t& value, uint64_t least) {
  uint64_t seen = revdist_load(&value);
  while (seen < least && !__atomic_compare_exchange_n(&value, &seen, least, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
}

// Bytes by which the device would be over its capacity with num_bytes more; 0 or less: it fits.
int64_t missing_bytes(const Account& account, uint64_t num_bytes) {
  return static_cast<int64_t>(revdist_used_bytes(account.ledger) + num_bytes) -
      static_cast<int64_t>(revdist_load(&account.ledger->capacity_bytes));
}

// Charges if it fits. Of two processes that charge at once at least one sees the other, so the
// capacity is never exceeded; both may see each other, step back and look again.
bool try_charge(const Account& account, uint64_t num_bytes) {
  for (int attempt = 0; attempt < kMaxBackOffs; ++attempt) {
    if (missing_bytes(account, num_bytes) > 0) return false;
    uint64_t current = add(account.slot->current_bytes, num_bytes);
    if (missing_bytes(account, 0) <= 0) {
      raise_to(account.slot->peak_bytes, current);
      return true;
    }
    subtract(account.slot->current_bytes, num_bytes);
    sched_yield();
  }
  return false;
}

// Frees the slots of dead processes. Whoever changes the owner first does it; were it to die in
// between, the slot would be its own, and the next one frees that. A process that has claimed the
// slot meanwhile keeps it.
void reclaim(const Account& account) {
  uint64_t here = revdist_pid_namespace();
  uint64_t self = revdist_load(&account.slot->owner);
  for (uint64_t i = 0; i < revdist_num_used_slots(account.ledger); ++i) {
    revdist_slot& slot = account.ledger->slots[i];
    uint64_t owner = revdist_load(&slot.owner);
    if (!revdist_slot_is_dead(&slot, here)) continue;
    if (!__atomic_compare_exchange_n(&slot.owner, &owner, self, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) continue;
    __atomic_store_n(&slot.current_bytes, uint64_t{0}, __ATOMIC_SEQ_CST);
    owner = self;
    __atomic_compare_exchange_n(&slot.owner, &owner, uint64_t{0}, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  }
}

// Asks the process to release memory until the charge fits or nothing more comes.
bool charge_after_callback(const Account& account, uint64_t num_bytes) {
  ShortageCallback callback = shortage_callback.load();
  if (callback == nullptr || inside_callback) return false;
  inside_callback = true;
  bool charged = false;
  while (!charged) {
    uint64_t before = revdist_load(&account.slot->current_bytes);
    int64_t missing = missing_bytes(account, num_bytes);
    int64_t released = missing > 0 ? callback(missing) : 0;
    charged = try_charge(account, num_bytes);
    bool progress = released > 0 && revdist_load(&account.slot->current_bytes) < before;
    if (missing > 0 && !progress) break;
  }
  inside_callback = false;
  return charged;
}

std::string size(uint64_t num_bytes) {
  static const char* const kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(num_bytes);
  int unit = 0;
  for (; value >= 1024 && unit < 4; ++unit) value /= 1024;
  char text[32];
  snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.1f %s", value, kUnits[unit]);
  return text;
}

[[noreturn]] void throw_out_of_memory(const Account& account, uint64_t num_bytes) {
  uint64_t capacity = revdist_load(&account.ledger->capacity_bytes);
  uint64_t used = revdist_used_bytes(account.ledger);
  std::string text = "device " + std::string(account.ledger->name) + " is out of memory: " + size(num_bytes) +
      " wanted, " + size(capacity > used ? capacity - used : 0) + " free of " + size(capacity) + ".";
  for (uint64_t i = 0; i < revdist_num_used_slots(account.ledger); ++i) {
    const revdist_slot& slot = account.ledger->slots[i];
    uint64_t owner = revdist_load(&slot.owner), held = revdist_load(&slot.current_bytes);
    if (owner == 0 || held == 0) continue;
    bool own = &slot == account.slot;
    text += " Process " + std::to_string(revdist_owner_pid(owner)) + " (" + (own ? "this one, " : "") + slot.name +
        ") holds " + size(held) + ".";
  }
  text += " Lower micro_batch or memory.budget, give the device more capacity, or end another holder.";
  C10_THROW_ERROR(OutOfMemoryError, text);
}

void charge(const Account& account, uint64_t num_bytes) {
  if (try_charge(account, num_bytes)) return;
  reclaim(account);
  if (try_charge(account, num_bytes) || charge_after_callback(account, num_bytes)) return;
  throw_out_of_memory(account, num_bytes);
}

// Gives back what `data` was charged, and returns how much that is; of memory that was never charged it knows nothing.
uint64_t uncharge(void* data) {
  Shard& shard = shard_of(data);
  std::lock_guard<std::mutex> guard(shard.mutex);
  auto found = shard.charges.find(data);
  if (found == shard.charges.end()) return 0;
  uint64_t num_bytes = found->second.num_bytes;
  subtract(found->second.slot->current_bytes, num_bytes);
  shard.charges.erase(found);
  return num_bytes;
}

bool worth_keeping(uint64_t num_bytes) {
  return keeps_blocks && num_bytes >= KeptBlocks::kLeastBytes && active_account.load(std::memory_order_relaxed) != nullptr;
}

void uncharge_and_delete(void* data) {
  if (data == nullptr) return;
  uint64_t num_bytes = uncharge(data);
  if (!worth_keeping(num_bytes)) return original_delete(data);
  c10::profiledCPUMemoryReporter().Delete(data);
  kept_blocks.keep(data, num_bytes);
}

// Memory for what has just been charged.
void* take_block(const Account& account, size_t num_bytes) {
  uint64_t now_bytes = revdist_load(&account.slot->current_bytes);
  uint64_t most_bytes = most_bytes_at_once.load(std::memory_order_relaxed);
  while (most_bytes < now_bytes && !most_bytes_at_once.compare_exchange_weak(most_bytes, now_bytes)) {
  }
  if (worth_keeping(num_bytes)) {
    if (void* data = kept_blocks.take(num_bytes)) {
      c10::profiledCPUMemoryReporter().New(data, num_bytes);
      return data;
    }
    most_bytes = std::max(most_bytes, now_bytes);
    kept_blocks.shrink_to(most_bytes + most_bytes / 4 - now_bytes);
  }
  try {
    return original->allocate(num_bytes).release_context();
  } catch (...) {
    if (kept_blocks.kept_bytes() == 0) throw;
    kept_blocks.shrink_to(0);
    return original->allocate(num_bytes).release_context();
  }
}

class LedgerAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t num_bytes) override {
    const Account* account = active_account.load(std::memory_order_acquire);
    if (account == nullptr || num_bytes == 0) return adopt(original->allocate(num_bytes).release_context());
    charge(*account, num_bytes);
    try {
      c10::DataPtr data = adopt(take_block(*account, num_bytes));
      Shard& shard = shard_of(data.get());
      std::lock_guard<std::mutex> guard(shard.mutex);
      shard.charges[data.get()] = Charge{account->slot, num_bytes};
      return data;
    } catch (...) {
      subtract(account->slot->current_bytes, num_bytes);
      throw;
    }
  }

  c10::DeleterFnPtr raw_deleter() const override { return &uncharge_and_delete; }

  void copy_data(void* target, const void* source, size_t num_bytes) const override {
    default_copy_data(target, source, num_bytes);
  }

 private:
  static c10::DataPtr adopt(void* address) {
    return {address, address, &uncharge_and_delete, c10::Device(c10::DeviceType::CPU)};
  }
};

void before_fork() {
  kept_blocks.lock();
  for (Shard& shard : shards) shard.mutex.lock();
}

void in_parent() {
  for (Shard& shard : shards) shard.mutex.unlock();
  kept_blocks.unlock();
}

// A child inherits the parent's tensors but not its slot: it charges nothing and gives nothing back.
void in_child() {
  active_account.store(nullptr);
  shortage_callback.store(nullptr);
  inside_callback = false;
  for (Shard& shard : shards) {
    shard.charges.clear();
    shard.mutex.unlock();
  }
  kept_blocks.unlock();
}

bool install() {
  original = c10::GetCPUAllocator();
  original_delete = original->raw_deleter();
  if (original_delete == nullptr) return false;
  keeps_blocks = original == c10::GetDefaultCPUAllocator();  // else free_cpu is not how a block is freed
  pthread_atfork(before_fork, in_parent, in_child);
  c10::SetCPUAllocator(new LedgerAllocator, 255);
  return true;
}

}  // namespace

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// Charges this process's CPU storages to slot `slot_index` of the ledger from now on. Returns 0 or an errno.
// The slot must be this process's own. Call it before other threads allocate: torch swaps allocators without a lock.
EXPORTED int revdist_activate(const char* path, uint32_t slot_index) {
  static const bool installed = install();
  if (!installed) return ENOTSUP;
  int file = open(path, O_RDWR | O_CLOEXEC);
  if (file < 0) return errno;
  void* memory = mmap(nullptr, sizeof(revdist_ledger), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  int error = errno;
  close(file);
  if (memory == MAP_FAILED) return error;
  auto* ledger = static_cast<revdist_ledger*>(memory);
  auto* account = new Account{ledger, &ledger->slots[slot_index]};
  reclaim(*account);
  active_account.store(account, std::memory_order_release);
  return 0;
}

// Charges no further storages. Those that were charged are given back when they are freed.
EXPORTED void revdist_deactivate() {
  shortage_callback.store(nullptr);
  active_account.store(nullptr);
  kept_blocks.shrink_to(0);
}

// Bytes of freed blocks that this process keeps: no tensor's, and no other process's either.
EXPORTED int64_t revdist_kept_bytes() { return static_cast<int64_t>(kept_blocks.kept_bytes()); }

// Whether this process charges; false in a forked child.
EXPORTED int revdist_is_active() { return active_account.load() != nullptr; }

EXPORTED int64_t revdist_allocated_bytes() {
  const Account* account = active_account.load();
  return account ? static_cast<int64_t>(revdist_load(&account->slot->current_bytes)) : 0;
}

EXPORTED int64_t revdist_peak_bytes() {
  const Account* account = active_account.load();
  return account ? static_cast<int64_t>(revdist_load(&account->slot->peak_bytes)) : 0;
}

EXPORTED void revdist_reset_peak() {
  const Account* account = active_account.load();
  if (account == nullptr) return;
  __atomic_store_n(&account->slot->peak_bytes, revdist_load(&account->slot->current_bytes), __ATOMIC_SEQ_CST);
}

// Called inside a failing allocation with the bytes that are missing; returns the bytes it released.
EXPORTED void revdist_on_shortage(ShortageCallback callback) { shortage_callback.store(callback); }

// Takes memory as a tensor storage would, and touches it. Returns null where the device has too little.
EXPORTED void* revdist_take(uint64_t num_bytes) {
  try {
    void* data = c10::GetCPUAllocator()->raw_allocate(num_bytes);
    return memset(data, 1, num_bytes);
  } catch (const c10::OutOfMemoryError&) {
    return nullptr;
  }
}

EXPORTED void revdist_give_back(void* data) { c10::GetCPUAllocator()->raw_deallocate(data); }
}
