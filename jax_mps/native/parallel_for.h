// Work sharing for kernels. In the namespace of the instruction set, like everything that a kernel's translation unit emits.
#pragma once

#include <cstdint>

#include "isa.h"
#include "threads.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

// body(begin, end) over pieces of [0, units); false if one of them returned false.
template <class Body>
bool ParallelFor(const Workers& workers, int64_t units, int64_t bytes_per_unit, const Body& body) {
  const auto call = [](const void* context, int64_t begin, int64_t end) {
    return (*static_cast<const Body*>(context))(begin, end);
  };
  return ShareWork(workers, units, bytes_per_unit, call, &body);
}

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
