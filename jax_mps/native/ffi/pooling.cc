// The calls of pooling: decode, check, run.

#include <algorithm>
#include <string>

#include "ffi/call.h"
#include "pooling/geometry.h"
#include "pooling/kernels.h"
#include "threads.h"

namespace ffi = xla::ffi;

namespace jax_mps {
namespace {

struct WindowAttrs {
  int64_t start;
  Integers window_shape, strides, window_dilation, low;
};

struct SelectAttrs {
  int64_t start;
  Integers window_shape, strides, window_dilation, low;
  int64_t with_padding;
};

struct AverageAttrs {
  int64_t start;
  Integers window_shape, strides, window_dilation, low;
  int64_t divisor;
  Integers band_low, band_high;
};

struct PlaneAttrs {
  int64_t start, rank;
};

}  // namespace
}  // namespace jax_mps

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_mps::WindowAttrs, ffi::StructMember<int64_t>("start"),
                                      ffi::StructMember<jax_mps::Integers>("window_shape"),
                                      ffi::StructMember<jax_mps::Integers>("strides"),
                                      ffi::StructMember<jax_mps::Integers>("window_dilation"),
                                      ffi::StructMember<jax_mps::Integers>("low"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_mps::SelectAttrs, ffi::StructMember<int64_t>("start"),
                                      ffi::StructMember<jax_mps::Integers>("window_shape"),
                                      ffi::StructMember<jax_mps::Integers>("strides"),
                                      ffi::StructMember<jax_mps::Integers>("window_dilation"),
                                      ffi::StructMember<jax_mps::Integers>("low"),
                                      ffi::StructMember<int64_t>("with_padding"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_mps::AverageAttrs, ffi::StructMember<int64_t>("start"),
                                      ffi::StructMember<jax_mps::Integers>("window_shape"),
                                      ffi::StructMember<jax_mps::Integers>("strides"),
                                      ffi::StructMember<jax_mps::Integers>("window_dilation"),
                                      ffi::StructMember<jax_mps::Integers>("low"), ffi::StructMember<int64_t>("divisor"),
                                      ffi::StructMember<jax_mps::Integers>("band_low"),
                                      ffi::StructMember<jax_mps::Integers>("band_high"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_mps::PlaneAttrs, ffi::StructMember<int64_t>("start"),
                                      ffi::StructMember<int64_t>("rank"));

namespace jax_mps {

// ---- Checks.

namespace {

// No sum or product of sizes overflows below these.
constexpr int64_t kMost = int64_t{1} << 31;  // strides, dilations, and taps of a window
constexpr int64_t kFar = int64_t{1} << 61;   // elements from the image to a tap

bool IsTap(Type type) { return type == Type::kS8 || type == Type::kS16 || type == Type::kS32; }

// A call while it is checked: the first complaint stays.
class Call {
 public:
  explicit Call(Op op) { problem_.op = op; }

  void Require(bool fine, const char* complaint) {
    if (!fine && error_.empty()) error_ = complaint;
  }

  // The image and the pooled array lay out the problem; attributes of the windows follow.
  void SetShapes(Integers image, Integers pooled, int64_t start, int64_t rank) {
    Require(rank >= 1 && rank <= 3, "the windows must have 1 to 3 axes");
    Require(image.size() == pooled.size(), "image and pooled array must have the same rank");
    Require(start >= 0 && rank <= static_cast<int64_t>(image.size()) && start <= static_cast<int64_t>(image.size()) - rank,
            "start does not leave room for the spatial axes");
    if (!error_.empty()) return;
    Geometry& geometry = problem_.geometry;
    for (int64_t d = 0; d < static_cast<int64_t>(image.size()); ++d) {
      if (d >= start && d < start + rank) {
        Axis& axis = geometry.axis[3 - rank + d - start];
        axis.size = image[d];
        axis.windows = pooled[d];
      } else {
        Require(image[d] == pooled[d], "image and pooled array must agree outside the spatial axes");
        (d < start ? geometry.outer : geometry.inner) *= image[d];
      }
    }
  }

  template <class Attrs>
  void SetWindows(Integers image, Integers pooled, const Attrs& attrs) {
    const int64_t rank = attrs.window_shape.size();
    for (Integers each : {attrs.strides, attrs.window_dilation, attrs.low}) {
      Require(static_cast<int64_t>(each.size()) == rank,
              "window_shape, strides, window_dilation and low must have one entry an axis");
    }
    SetShapes(image, pooled, attrs.start, rank);
    if (!error_.empty()) return;
    for (int64_t a = 0; a < rank; ++a) {
      Axis& axis = problem_.geometry.axis[3 - rank + a];
      axis.taps = attrs.window_shape[a];
      axis.stride = attrs.strides[a];
      axis.dilation = attrs.window_dilation[a];
      axis.low = attrs.low[a];
      Require(axis.taps >= 1 && axis.stride >= 1 && axis.dilation >= 1, "kernel, stride and dilation must be at least 1");
      Require(axis.low >= 0, "low must not be negative");
      Require(axis.stride < kMost && axis.dilation < kMost && axis.taps <= (kMost - 1) / taps_,
              "strides, dilations and the number of taps must be below 2**31");
      if (!error_.empty()) return;
      taps_ *= axis.taps;
      const int64_t far = kFar / std::max<int64_t>(problem_.geometry.inner, 1);
      Require(axis.dilation * axis.taps <= far && axis.low <= far && axis.stride <= far / std::max<int64_t>(axis.windows, 1),
              "windows must not reach 2**61 elements from the image");
    }
  }

  void SetDivisor(const AverageAttrs& attrs) {
    const int64_t rank = attrs.window_shape.size();
    Require(static_cast<int64_t>(attrs.band_low.size()) == rank && static_cast<int64_t>(attrs.band_high.size()) == rank,
            "band_low and band_high must have one entry an axis");
    for (Integers band : {attrs.band_low, attrs.band_high}) {
      Require(std::all_of(band.begin(), band.end(), [](int64_t n) { return -kFar <= n && n <= kFar; }),
              "bands must not reach 2**61 pixels from the image");
    }
    if (!error_.empty()) return;
    Geometry& geometry = problem_.geometry;
    geometry.divisor = attrs.divisor;
    if (attrs.divisor != 0) return;
    geometry.divisor = 1;
    for (int64_t a = 0; a < rank; ++a) {
      Axis& axis = geometry.axis[3 - rank + a];
      const int64_t last = axis.stride * (axis.windows - 1) - axis.low + axis.dilation * (axis.taps - 1);
      geometry.divisor *= axis.taps;
      geometry.weighted |= axis.low > attrs.band_low[a] || last >= axis.size + attrs.band_high[a];
    }
    for (int64_t a = 0; a < rank && geometry.weighted; ++a) {
      geometry.axis[3 - rank + a].band_low = attrs.band_low[a];
      geometry.axis[3 - rank + a].band_high = attrs.band_high[a];
    }
  }

  void SetType(Type type, Type second = Type::kOther) {
    problem_.type = type;
    problem_.second = second;
    const int bits = second == Type::kS8 ? 7 : second == Type::kS16 ? 15 : 31;
    Require(!IsTap(second) || taps_ <= int64_t{1} << bits, "the type of taps must have a number for each tap of a window");
  }
  void SetOperands(std::initializer_list<Operand> operands) {
    int i = 0;
    for (const Operand& operand : operands) problem_.operand[i++] = operand.untyped_data();
  }
  void SetResult(int i, Result& result) {
    problem_.result[i] = result->untyped_data();
    empty_ |= result->element_count() == 0;
    problem_.stream |= ExceedsCaches(result->size_bytes());
  }

  void SetPaddingFirst(bool with_padding) { problem_.with_padding = with_padding; }

  ffi::Error Run(ffi::ThreadPool& pool) {
    if (!error_.empty()) return ffi::Error::InvalidArgument("jax_mps: " + error_);
    if (empty_) return ffi::Error::Success();
    const Workers workers = WorkersOf(pool);
    problem_.workers = &workers;
    // Unpooling has no windows: its positions are numbers in a plane, whose axes have to stay.
    if (problem_.op != Op::kMaxUnpool && problem_.op != Op::kMaxUnpoolTake) MergeCoveredAxes(problem_.geometry);
    problem_.stream &= StreamsWell();
    if (ThisInstructionSet().execute(problem_)) return ffi::Error::Success();
    return NoMemory();
  }

 private:
  // Whether what is stored at once, a pixel of many channels or a row of few, are whole lines of the cache: to go past it
  // with parts of them is far slower than not to.
  bool StreamsWell() const {
    constexpr int64_t kLine = 64;
    const Geometry& geometry = problem_.geometry;
    const int64_t pixel = geometry.inner * (problem_.type == Type::kF64 ? 8 : 4);  // half precision is never streamed
    return (pixel < kLine ? pixel * geometry.axis[2].size : pixel) % kLine == 0;
  }

  Problem problem_ = {};
  int64_t taps_ = 1;  // of a window
  std::string error_;
  bool empty_ = false;
};

bool SameShape(Integers a, Integers b) { return a == b; }

constexpr char kNumber[] = "the element type must be a float or an integer of 8 to 32 bits";
constexpr char kFloat[] = "the element type must be a float";
constexpr char kTap[] = "taps must be int8, int16 or int32";
constexpr char kEqual[] = "element types must be equal";
constexpr char kNorm[] = "the norm must have the accumulator's type";
constexpr char kPooled[] = "pooled arrays must have the image's type or its accumulator's";
constexpr char kShapes[] = "shapes must be equal";

// ---- Handlers.

ffi::Error MaxPool(ffi::ThreadPool pool, WindowAttrs attrs, Operand x, Result y) {
  Call call(Op::kMaxPool);
  const Type type = TypeOf(x.element_type());
  call.Require(type != Type::kOther, kNumber);
  call.Require(y->element_type() == x.element_type(), kEqual);
  call.SetWindows(x.dimensions(), y->dimensions(), attrs);
  call.SetType(type);
  call.SetOperands({x});
  call.SetResult(0, y);
  return call.Run(pool);
}

ffi::Error MaxPoolSelectedTapIndex(ffi::ThreadPool pool, SelectAttrs attrs, Operand x, Result tap) {
  Call call(Op::kMaxPoolSelectedTapIndex);
  const Type type = TypeOf(x.element_type()), second = TypeOf(tap->element_type());
  call.Require(IsFloat(type), kFloat);
  call.Require(IsTap(second), kTap);
  call.SetWindows(x.dimensions(), tap->dimensions(), attrs);
  call.SetType(type, second);
  call.SetPaddingFirst(attrs.with_padding != 0);
  call.SetOperands({x});
  call.SetResult(0, tap);
  return call.Run(pool);
}

ffi::Error MaxPoolTapIndex(ffi::ThreadPool pool, WindowAttrs attrs, Operand x, Result tap) {
  Call call(Op::kMaxPoolTapIndex);
  const Type type = TypeOf(x.element_type()), second = TypeOf(tap->element_type());
  call.Require(type != Type::kOther, kNumber);
  call.Require(IsTap(second), kTap);
  call.SetWindows(x.dimensions(), tap->dimensions(), attrs);
  call.SetType(type, second);
  call.SetOperands({x});
  call.SetResult(1, tap);
  return call.Run(pool);
}

ffi::Error MaxPoolWithTapIndex(ffi::ThreadPool pool, WindowAttrs attrs, Operand x, Result y, Result tap) {
  Call call(Op::kMaxPoolTapIndex);
  const Type type = TypeOf(x.element_type()), second = TypeOf(tap->element_type());
  call.Require(type != Type::kOther, kNumber);
  call.Require(y->element_type() == x.element_type(), kEqual);
  call.Require(IsTap(second), kTap);
  call.Require(SameShape(y->dimensions(), tap->dimensions()), kShapes);
  call.SetWindows(x.dimensions(), y->dimensions(), attrs);
  call.SetType(type, second);
  call.SetOperands({x});
  call.SetResult(0, y);
  call.SetResult(1, tap);
  return call.Run(pool);
}

ffi::Error MaxPoolTake(ffi::ThreadPool pool, WindowAttrs attrs, Operand t, Operand tap, Result out) {
  Call call(Op::kMaxPoolTake);
  const Type type = TypeOf(t.element_type()), second = TypeOf(tap.element_type());
  call.Require(IsFloat(type), kFloat);
  call.Require(out->element_type() == t.element_type(), kEqual);
  call.Require(IsTap(second), kTap);
  call.Require(SameShape(out->dimensions(), tap.dimensions()), kShapes);
  call.SetWindows(t.dimensions(), tap.dimensions(), attrs);
  call.SetType(type, second);
  call.SetOperands({t, tap});
  call.SetResult(0, out);
  return call.Run(pool);
}

ffi::Error MaxPoolPut(ffi::ThreadPool pool, WindowAttrs attrs, Operand g, Operand tap, Result dx) {
  Call call(Op::kMaxPoolPut);
  const Type type = TypeOf(g.element_type()), second = TypeOf(tap.element_type());
  call.Require(IsFloat(type), kFloat);
  call.Require(dx->element_type() == g.element_type(), kEqual);
  call.Require(IsTap(second), kTap);
  call.Require(SameShape(g.dimensions(), tap.dimensions()), kShapes);
  call.SetWindows(dx->dimensions(), g.dimensions(), attrs);
  call.SetType(type, second);
  call.SetOperands({g, tap});
  call.SetResult(0, dx);
  return call.Run(pool);
}

ffi::Error Averaging(Op op, ffi::ThreadPool& pool, const AverageAttrs& attrs, Operand from, Result to) {
  Call call(op);
  const Type type = TypeOf(from.element_type());
  call.Require(IsFloat(type), kFloat);
  call.Require(to->element_type() == from.element_type(), kEqual);
  const bool forward = op == Op::kAvgPool;
  call.SetWindows(forward ? from.dimensions() : to->dimensions(), forward ? to->dimensions() : from.dimensions(), attrs);
  call.SetDivisor(attrs);
  call.SetType(type);
  call.SetOperands({from});
  call.SetResult(0, to);
  return call.Run(pool);
}

ffi::Error AvgPool(ffi::ThreadPool pool, AverageAttrs attrs, Operand x, Result y) {
  return Averaging(Op::kAvgPool, pool, attrs, x, y);
}

ffi::Error AvgPoolGradient(ffi::ThreadPool pool, AverageAttrs attrs, Operand g, Result dx) {
  return Averaging(Op::kAvgPoolGradient, pool, attrs, g, dx);
}

ffi::Error L2Pool(ffi::ThreadPool pool, WindowAttrs attrs, Operand x, Result y) {
  Call call(Op::kL2Pool);
  const Type type = TypeOf(x.element_type()), second = TypeOf(y->element_type());
  call.Require(IsFloat(type), kFloat);
  call.Require(second == type || second == Accumulator(type), kPooled);
  call.SetWindows(x.dimensions(), y->dimensions(), attrs);
  call.SetType(type, second);
  call.SetOperands({x});
  call.SetResult(0, y);
  return call.Run(pool);
}

ffi::Error L2PoolTangent(ffi::ThreadPool pool, WindowAttrs attrs, Operand t, Operand x, Operand y, Result out) {
  Call call(Op::kL2PoolTangent);
  const Type type = TypeOf(x.element_type()), second = TypeOf(out->element_type());
  call.Require(IsFloat(type), kFloat);
  call.Require(TypeOf(t.element_type()) == type, kEqual);
  call.Require(TypeOf(y.element_type()) == Accumulator(type), kNorm);
  call.Require(second == type || second == Accumulator(type), kPooled);
  call.Require(SameShape(t.dimensions(), x.dimensions()) && SameShape(y.dimensions(), out->dimensions()), kShapes);
  call.SetWindows(x.dimensions(), y.dimensions(), attrs);
  call.SetType(type, second);
  call.SetOperands({t, x, y});
  call.SetResult(0, out);
  return call.Run(pool);
}

ffi::Error L2PoolGradient(ffi::ThreadPool pool, WindowAttrs attrs, Operand g, Operand x, Operand y, Result dx) {
  Call call(Op::kL2PoolGradient);
  const Type type = TypeOf(x.element_type()), second = TypeOf(g.element_type());
  call.Require(IsFloat(type), kFloat);
  call.Require(TypeOf(dx->element_type()) == type, kEqual);
  call.Require(TypeOf(y.element_type()) == Accumulator(type), kNorm);
  call.Require(second == type || second == Accumulator(type), kPooled);
  call.Require(SameShape(g.dimensions(), y.dimensions()) && SameShape(x.dimensions(), dx->dimensions()), kShapes);
  call.SetWindows(x.dimensions(), y.dimensions(), attrs);
  call.SetType(type, second);
  call.SetOperands({g, x, y});
  call.SetResult(0, dx);
  return call.Run(pool);
}

ffi::Error MaxUnpool(ffi::ThreadPool pool, PlaneAttrs attrs, Operand y, Operand indices, Result image) {
  Call call(Op::kMaxUnpool);
  const Type type = TypeOf(y.element_type());
  call.Require(type != Type::kOther, kNumber);
  call.Require(image->element_type() == y.element_type(), kEqual);
  call.Require(TypeOf(indices.element_type()) == Type::kS32, "indices must be int32");
  call.Require(SameShape(y.dimensions(), indices.dimensions()), kShapes);
  call.SetShapes(image->dimensions(), y.dimensions(), attrs.start, attrs.rank);
  call.SetType(type);
  call.SetOperands({y, indices});
  call.SetResult(0, image);
  return call.Run(pool);
}

ffi::Error MaxUnpoolTake(ffi::ThreadPool pool, PlaneAttrs attrs, Operand image, Operand indices, Result out) {
  Call call(Op::kMaxUnpoolTake);
  const Type type = TypeOf(image.element_type());
  call.Require(type != Type::kOther, kNumber);
  call.Require(out->element_type() == image.element_type(), kEqual);
  call.Require(TypeOf(indices.element_type()) == Type::kS32, "indices must be int32");
  call.Require(SameShape(out->dimensions(), indices.dimensions()), kShapes);
  call.SetShapes(image.dimensions(), indices.dimensions(), attrs.start, attrs.rank);
  call.SetType(type);
  call.SetOperands({image, indices});
  call.SetResult(0, out);
  return call.Run(pool);
}

}  // namespace
}  // namespace jax_mps

JAX_MPS_HANDLER(MaxPool, WindowAttrs, 1, 1);
JAX_MPS_HANDLER(MaxPoolTapIndex, WindowAttrs, 1, 1);
JAX_MPS_HANDLER(MaxPoolWithTapIndex, WindowAttrs, 1, 2);
JAX_MPS_HANDLER(MaxPoolSelectedTapIndex, SelectAttrs, 1, 1);
JAX_MPS_HANDLER(MaxPoolTake, WindowAttrs, 2, 1);
JAX_MPS_HANDLER(MaxPoolPut, WindowAttrs, 2, 1);
JAX_MPS_HANDLER(AvgPool, AverageAttrs, 1, 1);
JAX_MPS_HANDLER(AvgPoolGradient, AverageAttrs, 1, 1);
JAX_MPS_HANDLER(L2Pool, WindowAttrs, 1, 1);
JAX_MPS_HANDLER(L2PoolTangent, WindowAttrs, 3, 1);
JAX_MPS_HANDLER(L2PoolGradient, WindowAttrs, 3, 1);
JAX_MPS_HANDLER(MaxUnpool, PlaneAttrs, 2, 1);
JAX_MPS_HANDLER(MaxUnpoolTake, PlaneAttrs, 2, 1);
