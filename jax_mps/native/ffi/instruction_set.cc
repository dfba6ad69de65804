// The kernels for this processor, element types, and what the library says of itself.

#include <cstdlib>
#include <cstring>

#include "conv/geometry.h"
#include "ffi/call.h"
#include "pooling/kernels.h"
#include "threads.h"

namespace ffi = xla::ffi;

namespace jax_mps {
namespace {

#if defined(__x86_64__) || defined(_M_X64)
bool HasV3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}

bool HasV4() {
  return HasV3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// The best of those that were built, that this processor has, and that JAX_MPS_INSTRUCTION_SET allows; none if there is
// no such one.
InstructionSet Choose() {
  __builtin_cpu_init();
  const char* limit = std::getenv("JAX_MPS_INSTRUCTION_SET");
  const bool at_most_v2 = limit != nullptr && std::strcmp(limit, "x86-64-v2") == 0;
  const bool at_most_v3 = at_most_v2 || (limit != nullptr && std::strcmp(limit, "x86-64-v3") == 0);
#ifdef JAX_MPS_HAS_x86_64_v4
  if (HasV4() && !at_most_v3) return {"x86-64-v4", x86_64_v4::Execute, x86_64_v4::Execute};
#endif
#ifdef JAX_MPS_HAS_x86_64_v3
  if (HasV3() && !at_most_v2) return {"x86-64-v3", x86_64_v3::Execute, x86_64_v3::Execute};
#endif
#ifdef JAX_MPS_HAS_x86_64_v2
  return {"x86-64-v2", x86_64_v2::Execute, x86_64_v2::Execute};
#else
  return {"", nullptr, nullptr};
#endif
}
#elif defined(__aarch64__)
InstructionSet Choose() { return {"aarch64", baseline::Execute, baseline::Execute}; }
#else
InstructionSet Choose() { return {"baseline", baseline::Execute, baseline::Execute}; }
#endif

}  // namespace

const InstructionSet& ThisInstructionSet() {
  static const InstructionSet chosen = Choose();
  return chosen;
}

Type TypeOf(ffi::DataType type) {
  switch (type) {
    case ffi::F32:
      return Type::kF32;
    case ffi::F64:
      return Type::kF64;
    case ffi::F16:
      return Type::kF16;
    case ffi::BF16:
      return Type::kBF16;
    case ffi::S8:
      return Type::kS8;
    case ffi::S16:
      return Type::kS16;
    case ffi::S32:
      return Type::kS32;
    case ffi::U8:
    case ffi::PRED:
      return Type::kU8;
    case ffi::U16:
      return Type::kU16;
    case ffi::U32:
      return Type::kU32;
    default:
      return Type::kOther;
  }
}

}  // namespace jax_mps

JAX_MPS_EXPORT const char* JaxMpsInstructionSet() { return jax_mps::ThisInstructionSet().name; }
JAX_MPS_EXPORT int JaxMpsInterface() { return JAX_MPS_INTERFACE; }
JAX_MPS_EXPORT const char* JaxMpsVersion() { return JAX_MPS_VERSION; }
JAX_MPS_EXPORT int JaxMpsFfiApiMinor() { return XLA_FFI_API_MINOR; }
JAX_MPS_EXPORT int JaxMpsThreads() { return jax_mps::ThreadCount(); }
