// Memory of torch's tensors on a CPU, built and loaded by arena.py, which says what it is for.

#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <mutex>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

constexpr size_t kGrain = size_t{1} << 16;   // of sizes and addresses
constexpr size_t kLarge = size_t{1} << 18;   // what is smaller is torch's own business
constexpr size_t kLargest = size_t{1} << 62; // beyond any size: a negative one, which torch refuses
constexpr size_t kSpare = 16;                // one part in 16 may be resident beyond the most that was ever in use

// One range of addresses, as large as the machine's memory, from which blocks are cut. Sizes and places are in grains.
class Arena {
 public:
  Arena() {
    const size_t bytes = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* range = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (range == MAP_FAILED) return;
    base_ = static_cast<char*>(range);
    resident_.resize(bytes / kGrain);
    holes_[0] = resident_.size();
  }

  bool exists() const { return base_ != nullptr; }
  std::mutex& mutex() { return mutex_; }

  bool owns(const void* block) const {
    return block >= base_ && block < base_ + resident_.size() * kGrain;
  }

  // A block in the hole where it takes the fewest new pages, the smallest of these, or null.
  void* take(size_t bytes) {
    const size_t size = (bytes + kGrain - 1) / kGrain;
    std::lock_guard<std::mutex> lock(mutex_);
    auto best = holes_.end();
    auto best_cost = std::make_pair(size + 1, size_t{0});
    for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {
      if (hole->second < size) continue;
      const auto cost = std::make_pair(size - residents_in(hole->first, size), hole->second);
      if (cost < best_cost) std::tie(best, best_cost) = std::make_pair(hole, cost);
    }
    if (best == holes_.end()) return nullptr;
    const auto [place, room] = *best;
    holes_.erase(best);
    if (room > size) holes_[place + size] = room - size;
    blocks_[place] = size;
    in_use_ += size;
    most_in_use_ = std::max(most_in_use_, in_use_);
    make_resident(place, size);
    return base_ + place * kGrain;
  }

  // A block becomes a hole, together with the holes on both sides of it.
  void give(void* block) {
    size_t place = static_cast<size_t>(static_cast<char*>(block) - base_) / kGrain;
    std::lock_guard<std::mutex> lock(mutex_);
    const auto known = blocks_.find(place);
    size_t size = known->second;
    blocks_.erase(known);
    in_use_ -= size;
    auto next = holes_.lower_bound(place);
    if (next != holes_.end() && next->first == place + size) {
      size += next->second;
      next = holes_.erase(next);
    }
    if (next != holes_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == place) {
        before->second += size;
        return;
      }
    }
    holes_[place] = size;
  }

 private:
  // Counts the pages that a block is the first to touch. Where they are too many, holes give up theirs, the last first.
  void make_resident(size_t place, size_t size) {
    top_ = std::max(top_, place + size);
    set_resident(place, size, true);
    const size_t most = most_in_use_ + most_in_use_ / kSpare;
    for (auto hole = holes_.rbegin(); hole != holes_.rend() && residents_ > most; ++hole) empty(hole->first, hole->second);
  }

  void empty(size_t place, size_t size) {
    if (place >= top_) return;
    size = std::min(size, top_ - place);
    if (residents_in(place, size) == 0) return;
    madvise(base_ + place * kGrain, size * kGrain, MADV_DONTNEED);
    set_resident(place, size, false);
  }

  size_t residents_in(size_t place, size_t size) const {
    const auto first = resident_.begin() + static_cast<std::ptrdiff_t>(place);
    return static_cast<size_t>(std::count(first, first + static_cast<std::ptrdiff_t>(size), true));
  }

  void set_resident(size_t place, size_t size, bool resident) {
    for (size_t grain = place; grain < place + size; ++grain) {
      residents_ += resident - resident_[grain];
      resident_[grain] = resident;
    }
  }

  char* base_ = nullptr;
  std::mutex mutex_;
  std::map<size_t, size_t> holes_;             // size by place; no two touch
  std::unordered_map<size_t, size_t> blocks_;  // size by place
  std::vector<bool> resident_;                 // whether a grain has pages
  size_t residents_ = 0, in_use_ = 0, most_in_use_ = 0;
  size_t top_ = 0;  // behind the last grain that ever had pages
};

// Never destroyed, like its allocator: tensors may outlive whatever is destroyed at exit.
Arena& arena() {
  static Arena* const only = new Arena;
  return *only;
}

void give_back(void* block) {
  if (block == nullptr) return;
  if (!arena().owns(block)) return c10::GetDefaultCPUAllocator()->raw_deleter()(block);
  c10::profiledCPUMemoryReporter().Delete(block);
  arena().give(block);
}

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* block = bytes < kLarge || bytes > kLargest ? nullptr : arena().take(bytes);
    if (block == nullptr) {
      c10::Allocator* const torchs = c10::GetDefaultCPUAllocator();
      c10::DataPtr found = torchs->allocate(bytes);
      static_cast<void>(found.compare_exchange_deleter(torchs->raw_deleter(), &give_back));
      return found;
    }
    c10::profiledCPUMemoryReporter().New(block, bytes);
    return {block, block, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

// Tensors come from the arena from now on; 0 if the system has no range of addresses for it.
extern "C" int lmh_use_arena() {
  static const int used = [] {
    if (!arena().exists()) return 0;
    const auto lock = [] { arena().mutex().lock(); };
    const auto unlock = [] { arena().mutex().unlock(); };
    pthread_atfork(lock, unlock, unlock);
    c10::SetCPUAllocator(new Allocator, 1);
    return 1;
  }();
  return used;
}
