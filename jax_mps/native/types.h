// Element types.
#pragma once

namespace jax_mps {

enum class Type { kF32, kF64, kF16, kBF16, kS8, kS16, kS32, kU8, kU16, kU32, kOther };

}  // namespace jax_mps
