// What the handlers of all families share: element types and the instruction set. Compiled for the baseline only.
#pragma once

#include <cstdint>
#include <functional>
#include <new>
#include <utility>

#include "ffi/order.h"
#include "pooling/kernels.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jax_mps {

struct ConvProblem;

using Integers = xla::ffi::Span<const int64_t>;
using Operand = xla::ffi::AnyBuffer;
using Result = xla::ffi::Result<xla::ffi::AnyBuffer>;

struct InstructionSet {
  const char* name;
  bool (*execute)(const Problem&);
  bool (*convolve)(const ConvProblem&);
};

const InstructionSet& ThisInstructionSet();

Type TypeOf(xla::ffi::DataType type);

inline bool IsFloat(Type type) {
  return type == Type::kF32 || type == Type::kF64 || type == Type::kF16 || type == Type::kBF16;
}

inline Type Accumulator(Type type) { return type == Type::kF64 ? Type::kF64 : Type::kF32; }

inline xla::ffi::Error NoMemory() { return {xla::ffi::ErrorCode::kResourceExhausted, "jax_mps: no memory for scratch"}; }

// What XLA moves to where another thread runs it.
class Task {
 public:
  explicit Task(std::function<void()> run) : run_(std::move(run)) {}
  Task(Task&& other) noexcept : run_(std::move(other.run_)) { Release(); }
  void operator()() const {
    Acquire();
    run_();
  }

 private:
  std::function<void()> run_;
};

inline Workers WorkersOf(xla::ffi::ThreadPool& pool) {
  return [&pool](std::function<void()> run) { pool.Schedule(Task(std::move(run))); };
}

// A handler from which no exception gets into XLA.
template <class... Args>
auto Guarded(xla::ffi::Error (*handler)(Args...)) {
  return [handler](Args... args) {
    const InOrder order;
    try {
      return handler(std::move(args)...);
    } catch (const std::bad_alloc&) {
      return NoMemory();
    }
  };
}

// A binding of `operands` arrays, `results` arrays and attributes, for handlers of the order (pool, attributes, arrays).
template <class Attrs, int operands, int results>
auto Bind() {
  using xla::ffi::AnyBuffer;
  auto binding = [] {
    auto call = xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().Attrs<Attrs>();
    if constexpr (operands == 1) return std::move(call).template Arg<AnyBuffer>();
    if constexpr (operands == 2) return std::move(call).template Arg<AnyBuffer>().template Arg<AnyBuffer>();
    if constexpr (operands == 3) {
      return std::move(call).template Arg<AnyBuffer>().template Arg<AnyBuffer>().template Arg<AnyBuffer>();
    }
  }();
  if constexpr (results == 1) return std::move(binding).template Ret<AnyBuffer>();
  if constexpr (results == 2) return std::move(binding).template Ret<AnyBuffer>().template Ret<AnyBuffer>();
}

}  // namespace jax_mps

// The symbols, the only ones the library shows.
#define JAX_MPS_EXPORT extern "C" __attribute__((visibility("default")))

#define JAX_MPS_HANDLER(name, attrs, operands, results)                        \
  JAX_MPS_EXPORT XLA_FFI_Error* JaxMps##name(XLA_FFI_CallFrame* frame);        \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMps##name, jax_mps::Guarded(jax_mps::name), \
                                (jax_mps::Bind<jax_mps::attrs, operands, results>()))
