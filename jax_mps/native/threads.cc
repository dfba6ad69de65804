#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace jax_mps {
namespace {

constexpr int64_t kGrain = 64 << 10;  // bytes: less than this is not worth a task
constexpr int64_t kTasksPerThread = 64;  // small ones: who finishes first waits for the rest of one

// Subnormal numbers count while this lives. XLA lets some of its threads flush them to zero, which would make the tap of a
// maximum, and the norm of a small vector, depend on the thread.
class Subnormals {
 public:
#if defined(__x86_64__) || defined(_M_X64)
  Subnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }
  ~Subnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  Subnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ & ~(uint64_t{1} << 24)));
  }
  ~Subnormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#endif
};

// The tasks that a thread takes first. Every call cuts the same work in the same way, so that a thread finds in its caches
// what it left there; who is done with his share helps the others.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

// The system may wake a thread on the core of the one that called it, while other cores idle, and let the two share it for
// milliseconds. Who finds himself there moves on; afterwards he may run where he could before.
int Core() {
#ifdef __linux__
  return sched_getcpu();
#else
  return -1;
#endif
}

void LeaveCore(int core) {
#ifdef __linux__
  cpu_set_t allowed;
  if (core < 0 || Core() != core || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  cpu_set_t others = allowed;
  CPU_CLR(core, &others);
  if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
#else
  (void)core;
#endif
}

// The pages of a large result, which the system may not have supplied yet. Whoever writes to one first asks for it, and finds it
// in his cache. But a core gets the memory first that it freed itself, as the caller's does with results, while another may get
// some that a virtual machine had returned to its host, and then waits for a page for milliseconds, call after call. Once that
// was seen, the caller asks for all the pages of the next results, ahead of the others.
#ifdef __linux__
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

constexpr uintptr_t kHugePage = 2 << 20;

std::atomic<int> results_with_slow_pages{0};  // that are expected

class Pages {
 public:
  // The second thread starts at `share`, a part of the result.
  void Set(void* data, size_t bytes, double share) {
    constexpr uintptr_t kSmall = 64 << 10;  // a multiple of every system's small pages
    begin_ = (reinterpret_cast<uintptr_t>(data) + kSmall - 1) & ~(kSmall - 1);
    end_ = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kSmall - 1);
    if (bytes < 2 * kHugePage || (Supplied(begin_) && Supplied(end_ - kSmall))) return;
    count_ = (end_ - 1) / kHugePage - begin_ / kHugePage + 1;
    first_ = static_cast<int64_t>(count_ * share);
    state_ = std::make_unique<std::atomic<State>[]>(count_);
    caller_asks_ = results_with_slow_pages.load() > 0 && results_with_slow_pages.fetch_sub(1) > 0;
  }

  // The caller, before anything else.
  void Begin() {
    for (int64_t i = 0; caller_asks_ && i < count_; ++i) Ask((first_ + i) % count_, true);
  }

  // A thread, before it writes to this part of the result.
  void Need(double begin, double end, bool caller) {
    if (count_ == 0) return;
    const int64_t last = std::min(count_ - 1, static_cast<int64_t>(count_ * end));
    for (int64_t page = static_cast<int64_t>(count_ * begin); page <= last; ++page) {
      if (!caller_asks_) Ask(page, caller);
      while (state_[page].load() != kThere) std::this_thread::yield();
    }
  }

 private:
  enum State { kNobodyAsked, kAsked, kThere };

  void Ask(int64_t number, bool caller) {
    State before = kNobodyAsked;
    if (!state_[number].compare_exchange_strong(before, kAsked)) return;
    const uintptr_t page = (begin_ / kHugePage + number) * kHugePage;
    const uintptr_t begin = std::max(page, begin_), end = std::min(page + kHugePage, end_);
    const auto start = std::chrono::steady_clock::now();
    // An older system refuses, and supplies each page when it is touched.
    if (!Supplied(begin)) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);
    if (!caller && std::chrono::steady_clock::now() - start > std::chrono::milliseconds(2)) ExpectSlowPages(32);
    state_[number] = kThere;
  }

  static bool Supplied(uintptr_t address) {
    unsigned char resident;
    return mincore(reinterpret_cast<void*>(address), 1, &resident) != 0 || (resident & 1) != 0;
  }

  uintptr_t begin_, end_;
  int64_t count_ = 0, first_;
  bool caller_asks_ = false;
  std::unique_ptr<std::atomic<State>[]> state_;
};
#else
struct Pages {
  void Set(void*, size_t, double) {}
  void Begin() {}
  void Need(double, double, bool) {}
};
#endif

struct Job {
  int64_t units, tasks, threads;
  bool (*body)(const void*, int64_t, int64_t);
  const void* context;
  std::thread::id caller;
  int core;  // of the caller
  std::unique_ptr<Share[]> shares;
  Pages pages;
  std::atomic<int64_t> done{0};
  std::atomic<bool> ok{true};
  std::mutex mutex;
  std::condition_variable finished;

  // Takes tasks until none is left, those of share `number` first. `body` and `context` die with the call that made them, so
  // they are touched only between taking a task and counting it done, which every thread does once, for all of his.
  void Work(int64_t number) {
    const bool calling = std::this_thread::get_id() == caller;  // in a scheduled task too, if the pool runs it at once
    if (calling) pages.Begin();
    else LeaveCore(core);
    const Subnormals subnormals;
    int64_t mine = 0;
    for (int64_t i = 0; i < threads; ++i) {
      Share& share = shares[(number + i) % threads];
      for (int64_t task; (task = share.next.fetch_add(1)) < share.end; ++mine) {
        pages.Need(static_cast<double>(task) / tasks, static_cast<double>(task + 1) / tasks, calling);
        if (!body(context, units * task / tasks, units * (task + 1) / tasks)) ok = false;
      }
    }
    if (mine > 0 && done.fetch_add(mine) + mine == tasks) {
      std::lock_guard<std::mutex> lock(mutex);
      finished.notify_all();
    }
  }

  void Wait() {
    for (int spin = 0; spin < 1000 && done.load() < tasks; ++spin) std::this_thread::yield();
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [this] { return done.load() == tasks; });
  }
};

}  // namespace

int ThreadCount() {
  static const int count = [] {
    const char* nproc = std::getenv("NPROC");
    if (nproc != nullptr && std::atoi(nproc) > 0) return std::atoi(nproc);
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    return std::max<int>(1, std::thread::hardware_concurrency());
  }();
  return count;
}

bool ParallelFor(const Workers& workers, int64_t units, int64_t bytes_per_unit,
                 bool (*body)(const void*, int64_t, int64_t), const void* context) {
  const double bytes = static_cast<double>(units) * bytes_per_unit;
  const int64_t wanted = ThreadCount() * kTasksPerThread;
  const int64_t tasks = std::min({units, wanted, static_cast<int64_t>(bytes / kGrain)});
  if (ThreadCount() == 1 || tasks <= 1) {
    const Subnormals subnormals;
    return body(context, 0, units);
  }

  const auto job = std::make_shared<Job>();
  job->units = units;
  job->tasks = tasks;
  job->threads = std::min<int64_t>(ThreadCount(), tasks);
  job->body = body;
  job->context = context;
  job->caller = std::this_thread::get_id();
  job->core = Core();
  job->shares = std::make_unique<Share[]>(job->threads);
  for (int64_t i = 0; i < job->threads; ++i) {
    job->shares[i].next = tasks * i / job->threads;
    job->shares[i].end = tasks * (i + 1) / job->threads;
  }
  job->pages.Set(workers.result, workers.bytes, static_cast<double>(job->shares[1].next) / tasks);
  for (int64_t number = 1; number < job->threads; ++number) {
    workers.schedule([job, number] { job->Work(number); });
  }
  job->Work(0);
  job->Wait();
  return job->ok;
}

void ExpectSlowPages(int results) {
#ifdef __linux__
  results_with_slow_pages = results;
#else
  (void)results;
#endif
}

void* Scratch(size_t bytes) {
  struct Free {
    void operator()(void* data) const { operator delete(data, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<void, Free> buffer;
  thread_local size_t size = 0;
  if (bytes > size) {
    buffer.reset(operator new(bytes, std::align_val_t(64), std::nothrow));
    size = buffer ? bytes : 0;
  }
  return buffer.get();
}

bool ExceedsCaches(size_t bytes) {
  static const size_t limit = [] {
    long cache = 0;
#ifdef __linux__
    // sysconf() adds up the caches of all the cores of some processors; a core has only one of them.
    if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
      if (std::fscanf(file, "%ldK", &cache) == 1) cache <<= 10;
      std::fclose(file);
    }
#endif
#ifdef _SC_LEVEL3_CACHE_SIZE
    if (cache <= 0) cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    // What reads the result next has operands of its own: half the cache is what one result may hope for.
    return (cache > 0 ? static_cast<size_t>(cache) : size_t{32} << 20) / 2;
  }();
  return bytes > limit;
}

void PreferHugePages(void* data, size_t bytes) {
#ifdef __linux__
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace jax_mps
