// Work sharing on XLA's own thread pool, and scratch memory. Compiled once for the baseline instruction set; parallel_for.h
// has the form that kernels use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace jax_mps {

// XLA's pool: hands a task to it. The task may run late, or after the call that scheduled it returned.
using Workers = std::function<void(std::function<void()>)>;

// Threads of XLA's pool: NPROC where it is set, as XLA itself does, else the processors this process may use.
int ThreadCount();

// Runs body(context, begin, end) over pieces of [0, units), and returns false if one of them did or had no memory. The
// caller works too and waits only for pieces that another thread has begun: waiting for scheduled ones deadlocks when every
// thread of the pool waits like that.
bool ShareWork(const Workers& workers, int64_t units, int64_t bytes_per_unit,
               bool (*body)(const void* context, int64_t begin, int64_t end), const void* context);

// None: the caller does all of the work.
extern const Workers kAlone;

// Scratch of the calling thread, 64-byte aligned, valid until its next request with that number or the end of ShareWork's
// body; null if there is no memory. Between calls of XLA a thread keeps a few megabytes of it at most.
void* Scratch(size_t bytes, int number = 0);

// Whether a result of that size had better not go through the caches.
bool ExceedsCaches(size_t bytes);

}  // namespace jax_mps
