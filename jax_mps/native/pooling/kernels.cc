// All kernels, in the namespace JAX_MPS_ISA and for its instruction set.
//
// Nothing here may emit a function that another translation unit could emit too (an inline function of the standard library,
// say): the linker keeps one copy, perhaps the one that needs the newest processor. Hence plain data and own templates.

#include "pooling/kernels.h"

#include "isa.h"
#include "pooling/avg_pool.h"
#include "pooling/l2_pool.h"
#include "pooling/lanes.h"
#include "pooling/max_pool.h"
#include "pooling/max_pool_put.h"
#include "pooling/selected_tap.h"
#include "pooling/unpool.h"
#include "simd.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

template <class T>
struct Tag {
  using type = T;
};

template <class Body>
bool WithFloat(Type type, const Body& body) {
  switch (type) {
    case Type::kF32:
      return body(Tag<float>());
    case Type::kF64:
      return body(Tag<double>());
    case Type::kF16:
      return body(Tag<F16>());
    case Type::kBF16:
      return body(Tag<BF16>());
    default:
      __builtin_unreachable();
  }
}

// The image's type and the pooled array's, which is that or the accumulator's.
template <class Body>
bool WithNorm(const Problem& problem, const Body& body) {
  return WithFloat(problem.type, [&](auto t) {
    using T = typename decltype(t)::type;
    return problem.second == problem.type ? body(t, t) : body(t, Tag<Acc<T>>());
  });
}

// One type stands for all that compare alike but for a constant.
template <class Body>
bool WithOrder(Type type, const Body& body) {
  switch (type) {
    case Type::kF32:
      return body(Tag<float>());
    case Type::kF64:
      return body(Tag<double>());
    case Type::kF16:
    case Type::kBF16:
      return body(Tag<Half>());
    case Type::kS8:
    case Type::kU8:
      return body(Tag<int8_t>());
    case Type::kS16:
    case Type::kU16:
      return body(Tag<int16_t>());
    case Type::kS32:
    case Type::kU32:
      return body(Tag<int32_t>());
    default:
      __builtin_unreachable();
  }
}

template <class Body>
bool WithTap(Type type, const Body& body) {
  switch (type) {
    case Type::kS8:
      return body(Tag<int8_t>());
    case Type::kS16:
      return body(Tag<int16_t>());
    default:
      return body(Tag<int32_t>());
  }
}

// Where elements are only moved, one type stands for all of a size.
template <class Body>
bool WithSize(Type type, const Body& body) {
  switch (type) {
    case Type::kF64:
      return body(Tag<uint64_t>());
    case Type::kF32:
    case Type::kS32:
    case Type::kU32:
      return body(Tag<uint32_t>());
    case Type::kS8:
    case Type::kU8:
      return body(Tag<uint8_t>());
    default:
      return body(Tag<uint16_t>());
  }
}

template <class Body>
bool WithFloatSize(Type type, const Body& body) {
  switch (type) {
    case Type::kF64:
      return body(Tag<uint64_t>());
    case Type::kF32:
      return body(Tag<uint32_t>());
    default:
      return body(Tag<uint16_t>());
  }
}

bool Run(const Problem& problem) {
  const Type type = problem.type;
  switch (problem.op) {
    case Op::kMaxPool:
      return WithOrder(type, [&](auto t) { return MaxPool<typename decltype(t)::type>(problem); });
    case Op::kMaxPoolTapIndex:
      return WithOrder(type, [&](auto t) { return MaxPoolTapIndex<typename decltype(t)::type>(problem); });
    case Op::kMaxPoolSelectedTapIndex:
      return WithFloat(type, [&](auto t) { return MaxPoolSelectedTapIndex<typename decltype(t)::type>(problem); });
    case Op::kMaxPoolTake:
      return WithFloatSize(type, [&](auto t) { return MaxPoolTake<typename decltype(t)::type>(problem); });
    case Op::kMaxPoolPut:
      return WithFloat(type, [&](auto t) {
        return WithTap(problem.second,
                       [&](auto i) { return MaxPoolPut<typename decltype(t)::type, typename decltype(i)::type>(problem); });
      });
    case Op::kAvgPool:
      return WithFloat(type, [&](auto t) { return Averaging<Average, typename decltype(t)::type>(problem); });
    case Op::kAvgPoolGradient:
      return WithFloat(type, [&](auto t) { return Averaging<AverageGradient, typename decltype(t)::type>(problem); });
    case Op::kL2Pool:
      return WithNorm(
          problem, [&](auto t, auto r) { return L2Pool<typename decltype(t)::type, typename decltype(r)::type>(problem); });
    case Op::kL2PoolTangent:
      return WithNorm(problem, [&](auto t, auto r) {
        return L2PoolTangent<typename decltype(t)::type, typename decltype(r)::type>(problem);
      });
    case Op::kL2PoolGradient:
      return WithNorm(problem, [&](auto t, auto g) {
        return L2PoolGradient<typename decltype(t)::type, typename decltype(g)::type>(problem);
      });
    case Op::kMaxUnpool:
      return WithSize(type, [&](auto t) { return MaxUnpool<typename decltype(t)::type>(problem); });
    case Op::kMaxUnpoolTake:
      return WithSize(type, [&](auto t) { return MaxUnpoolTake<typename decltype(t)::type>(problem); });
  }
  __builtin_unreachable();
}

}  // namespace

bool Execute(const Problem& problem) {
  const Lanes lanes(problem);
  if (lanes.planes > 0) return InLanes(problem, lanes, Run);
  return Run(problem);
}

}  // namespace jax_mps::JAX_MPS_ISA
