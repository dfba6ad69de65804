#include "threads.h"

#include <algorithm>
#include <atomic>
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
#include <unistd.h>
#endif

namespace jax_mps {
namespace {

constexpr int64_t kGrain = 64 << 10;     // bytes: less than this is not worth a task
constexpr int64_t kTasksPerThread = 64;  // many small ones: a thread without work waits for the rest of one at most
constexpr int kSpins = 200;              // while the last tasks of other threads end; after these the caller sleeps
constexpr size_t kKept = 4 << 20;        // bytes of each scratch that a thread keeps from call to call

// Subnormal numbers count while this lives. XLA lets some of its threads flush them to zero: then the tap of a maximum, and
// the norm of a small vector, would depend on the thread.
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

class Buffer {
 public:
  void* Get(size_t bytes) {
    if (bytes > size_) {
      data_.reset(operator new(bytes, std::align_val_t(64), std::nothrow));
      size_ = data_ ? bytes : 0;
    }
    return data_.get();
  }
  void Trim() {
    if (size_ <= kKept) return;
    data_.reset();
    size_ = 0;
  }

 private:
  struct Free {
    void operator()(void* data) const { operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

thread_local Buffer scratch[2];

void TrimScratch() {
  for (Buffer& buffer : scratch) buffer.Trim();
}

// What a piece cannot allocate must not unwind the stack of a thread of the pool, nor that of a caller for whom others work.
bool Try(bool (*body)(const void*, int64_t, int64_t), const void* context, int64_t begin, int64_t end) {
  try {
    return body(context, begin, end);
  } catch (const std::bad_alloc&) {
    return false;
  }
}

// The tasks that a thread takes first. Every call cuts the same work in the same way, so a thread often finds its data in
// its caches. A thread that has finished its share takes tasks of the others.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

struct Job : std::enable_shared_from_this<Job> {
  const Workers* workers;
  int64_t units, tasks, threads;
  bool (*body)(const void*, int64_t, int64_t);
  const void* context;
  std::unique_ptr<Share[]> shares;
  std::atomic<int64_t> done{0};
  std::atomic<bool> ok{true};
  std::mutex mutex;
  std::condition_variable finished;

  // Takes tasks until none is left, those of share `number` first. `workers`, `body` and `context` die with the call that
  // made them, so a thread touches them only between taking a task and counting it done. It counts once, for all its tasks.
  void Work(int64_t number) {
    const Subnormals subnormals;
    int64_t mine = 0;
    for (int64_t i = 0; i < threads; ++i) {
      Share& share = shares[(number + i) % threads];
      for (int64_t task; (task = share.next.fetch_add(1)) < share.end; ++mine) {
        if (mine == 0) Call(number);
        if (!Try(body, context, units * task / tasks, units * (task + 1) / tasks)) ok = false;
      }
    }
    TrimScratch();
    if (mine > 0 && done.fetch_add(mine) + mine == tasks) {
      std::lock_guard<std::mutex> lock(mutex);
      finished.notify_all();
    }
  }

  // To wake a thread takes as long as a small task does: each wakes two others, instead of the caller all of them.
  void Call(int64_t number) {
    try {
      for (int64_t other = 2 * number + 1; other < threads && other <= 2 * number + 2; ++other) {
        (*workers)([job = shared_from_this(), other] { job->Work(other); });
      }
    } catch (const std::bad_alloc&) {
      return;  // those who are awake do the work
    }
  }

  void Wait() {
    for (int spin = 0; spin < kSpins && done.load() < tasks; ++spin) std::this_thread::yield();
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

bool ShareWork(const Workers& workers, int64_t units, int64_t bytes_per_unit, bool (*body)(const void*, int64_t, int64_t),
               const void* context) {
  const double bytes = static_cast<double>(units) * bytes_per_unit;
  const int64_t wanted = ThreadCount() * kTasksPerThread;
  const int64_t tasks = std::min({units, wanted, static_cast<int64_t>(bytes / kGrain)});
  if (ThreadCount() == 1 || tasks <= 1 || !workers) {
    const Subnormals subnormals;
    const bool ok = Try(body, context, 0, units);
    if (workers) TrimScratch();  // else it is a part of a body that has scratch of its own
    return ok;
  }

  const auto job = std::make_shared<Job>();
  job->workers = &workers;
  job->units = units;
  job->tasks = tasks;
  job->threads = std::min<int64_t>(ThreadCount(), tasks);
  job->body = body;
  job->context = context;
  job->shares = std::make_unique<Share[]>(job->threads);
  for (int64_t i = 0; i < job->threads; ++i) {
    job->shares[i].next = tasks * i / job->threads;
    job->shares[i].end = tasks * (i + 1) / job->threads;
  }
  job->Work(0);
  job->Wait();
  return job->ok;
}

const Workers kAlone;

void* Scratch(size_t bytes, int number) { return scratch[number].Get(bytes); }

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

}  // namespace jax_mps
