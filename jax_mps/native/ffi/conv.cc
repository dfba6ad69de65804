// The calls of transposed convolution: decode and check.

#include <string>

#include "conv/geometry.h"
#include "ffi/call.h"

namespace ffi = xla::ffi;

namespace jax_mps {
namespace {

struct ConvAttrs {
  int64_t start, channel, groups, transpose_kernel;
  Integers window_shape, strides, window_dilation, low;
};

}  // namespace
}  // namespace jax_mps

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_mps::ConvAttrs, ffi::StructMember<int64_t>("start"),
                                      ffi::StructMember<int64_t>("channel"), ffi::StructMember<int64_t>("groups"),
                                      ffi::StructMember<int64_t>("transpose_kernel"),
                                      ffi::StructMember<jax_mps::Integers>("window_shape"),
                                      ffi::StructMember<jax_mps::Integers>("strides"),
                                      ffi::StructMember<jax_mps::Integers>("window_dilation"),
                                      ffi::StructMember<jax_mps::Integers>("low"));

namespace jax_mps {
namespace {

constexpr int64_t kLimit = int64_t{1} << 31;  // of strides, dilations, kernels and offsets

// Fills in what the shapes and attributes say; returns a complaint, or an empty string.
std::string Describe(const ConvAttrs& attrs, Integers windows, Integers image, Integers kernel, ConvProblem& problem) {
  const int64_t rank = attrs.window_shape.size(), dimensions = windows.size(), start = attrs.start;
  if (rank < 1 || rank > 3) return "the windows must have 1 to 3 axes";
  for (Integers each : {attrs.strides, attrs.window_dilation, attrs.low}) {
    if (static_cast<int64_t>(each.size()) != rank)
      return "window_shape, strides, window_dilation and low must have one entry an axis";
  }
  if (windows.size() != image.size()) return "source and image must have the same rank";
  if (static_cast<int64_t>(kernel.size()) != rank + 2) return "the kernel must have an entry an axis and two of channels";
  problem.channels_last = attrs.channel == start + rank;
  if (!problem.channels_last && attrs.channel != start - 1)
    return "channel must be the axis before or after the spatial ones";
  const int64_t batch_axes = problem.channels_last ? start : start - 1;
  if (batch_axes < 0 || batch_axes + rank + 1 != dimensions) return "start does not leave room for the spatial axes";
  problem.batch = 1;
  for (int64_t d = 0; d < batch_axes; ++d) {
    if (windows[d] != image[d]) return "source and image must agree in their batch axes";
    problem.batch *= windows[d];
  }
  problem.in = windows[attrs.channel];
  problem.out = image[attrs.channel];
  problem.groups = attrs.groups;
  problem.transpose_kernel = attrs.transpose_kernel != 0;
  if (problem.groups < 1 || problem.in % problem.groups != 0 || problem.out % problem.groups != 0) {
    return "groups must divide both numbers of channels";
  }
  for (int64_t a = 0; a < rank; ++a) {
    Axis& axis = problem.axis[3 - rank + a];
    axis.size = image[start + a];
    axis.windows = windows[start + a];
    axis.taps = attrs.window_shape[a];
    if (axis.taps != kernel[a]) return "window_shape must be that of the kernel";
    axis.stride = attrs.strides[a];
    axis.dilation = attrs.window_dilation[a];
    axis.low = attrs.low[a];
    if (axis.taps < 1 || axis.stride < 1 || axis.dilation < 1)
      return "window_shape, strides and window_dilation must be at least 1";
    if (axis.taps >= kLimit || axis.stride >= kLimit || axis.dilation >= kLimit || axis.low >= kLimit ||
        axis.low <= -kLimit || axis.taps * axis.dilation >= kLimit) {
      return "window_shape, strides, window_dilation and low must be below 2**31";
    }
  }
  const int64_t first = problem.transpose_kernel ? problem.out / problem.groups : problem.in / problem.groups;
  if (kernel[rank] != first || kernel[rank + 1] != (problem.transpose_kernel ? problem.in : problem.out)) {
    return "the kernel's channels do not match";
  }
  return "";
}

ffi::Error Run(ConvOp op, ffi::ThreadPool& pool, const ConvAttrs& attrs, const Operand& first, const Operand& second,
               Result& result, Integers windows, Integers image, Integers kernel) {
  ConvProblem problem = {};
  problem.op = op;
  problem.type = TypeOf(first.element_type());
  std::string error;
  if (!IsFloat(problem.type)) error = "the element type must be a float";
  if (second.element_type() != first.element_type()) error = "element types must be equal";
  const Type type = TypeOf(result->element_type());
  problem.wide = type != problem.type;
  if (problem.wide && type != Accumulator(problem.type))
    error = "the result must have the operands' type or their accumulator's";
  if (error.empty()) error = Describe(attrs, windows, image, kernel, problem);
  if (!error.empty()) return ffi::Error::InvalidArgument("jax_mps: " + error);
  if (result->element_count() == 0) return ffi::Error::Success();
  problem.operand[0] = first.untyped_data();
  problem.operand[1] = second.untyped_data();
  problem.result = result->untyped_data();
  const Workers workers = WorkersOf(pool);
  problem.workers = &workers;
  if (ThisInstructionSet().convolve(problem)) return ffi::Error::Success();
  return NoMemory();
}

ffi::Error ConvTranspose(ffi::ThreadPool pool, ConvAttrs attrs, Operand x, Operand kernel, Result y) {
  return Run(ConvOp::kForward, pool, attrs, x, kernel, y, x.dimensions(), y->dimensions(), kernel.dimensions());
}

ffi::Error ConvTransposeGradientData(ffi::ThreadPool pool, ConvAttrs attrs, Operand g, Operand kernel, Result dx) {
  return Run(ConvOp::kDataGradient, pool, attrs, g, kernel, dx, dx->dimensions(), g.dimensions(), kernel.dimensions());
}

ffi::Error ConvTransposeGradientWeights(ffi::ThreadPool pool, ConvAttrs attrs, Operand g, Operand x, Result dkernel) {
  return Run(ConvOp::kWeightGradient, pool, attrs, g, x, dkernel, x.dimensions(), g.dimensions(), dkernel->dimensions());
}

}  // namespace
}  // namespace jax_mps

JAX_MPS_HANDLER(ConvTranspose, ConvAttrs, 2, 1);
JAX_MPS_HANDLER(ConvTransposeGradientData, ConvAttrs, 2, 1);
JAX_MPS_HANDLER(ConvTransposeGradientWeights, ConvAttrs, 2, 1);
