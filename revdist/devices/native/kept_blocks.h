// Freed blocks that wait to be used again, as a GPU's allocator keeps them.
//
// malloc gives memory back to the system: large blocks at once, and others whenever the end of a heap is free, in
// threads other than the first even entire heaps. The next step asks for the same blocks, and pays for every page with
// a fault. Steps are alike, so a block of exactly the size that was freed is what will be asked for.

#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

class KeptBlocks {
 public:
  using Free = void (*)(void*);

  // Smaller ones are malloc's affair: it keeps them itself, and is quick.
  static constexpr size_t kLeastBytes = 32 * 1024;

  explicit KeptBlocks(Free free) : free_(free) {}

  // A block of exactly that size, the one that was freed last; null where there is none.
  void* take(size_t num_bytes) {
    std::lock_guard<std::mutex> guard(mutex_);
    auto found = by_size_.find(num_bytes);
    if (found == by_size_.end()) return nullptr;
    void* data = found->second.back();
    found->second.pop_back();
    if (found->second.empty()) by_size_.erase(found);
    kept_bytes_ -= num_bytes;
    return data;
  }

  void keep(void* data, size_t num_bytes) {
    std::lock_guard<std::mutex> guard(mutex_);
    by_size_[num_bytes].push_back(data);
    kept_bytes_ += num_bytes;
  }

  // Frees blocks, largest first, until at most so many bytes are kept.
  void shrink_to(uint64_t most_bytes) {
    std::lock_guard<std::mutex> guard(mutex_);
    while (kept_bytes_ > most_bytes) {
      auto largest = std::prev(by_size_.end());
      free_(largest->second.back());
      kept_bytes_ -= largest->first;
      largest->second.pop_back();
      if (largest->second.empty()) by_size_.erase(largest);
    }
  }

  uint64_t kept_bytes() {
    std::lock_guard<std::mutex> guard(mutex_);
    return kept_bytes_;
  }

  // For a fork: no other thread may be in the middle of a change.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  Free free_;
  std::mutex mutex_;
  std::map<size_t, std::vector<void*>> by_size_;
  uint64_t kept_bytes_ = 0;
};
