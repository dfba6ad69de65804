// What ThreadSanitizer cannot see: XLA, which is built without it, runs a call after those whose results it reads, and a
// task after it was scheduled. Nothing elsewhere.
#pragma once

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

namespace jax_mps {

inline char order;

// What came before a Release comes before what follows an Acquire.
inline void Release() {
#ifdef __SANITIZE_THREAD__
  __tsan_release(&order);
#endif
}

inline void Acquire() {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(&order);
#endif
}

// A call.
class InOrder {
 public:
  InOrder() { Acquire(); }
  ~InOrder() { Release(); }
};

}  // namespace jax_mps
