// Transposed convolution as integers.
//
// Window j of the source side touches pixel stride * j - low + dilation * k of the image through tap k. The forward pass and
// the data gradient are the same gather: a target (pixel forward, window backward) reads sources through taps. Targets that
// read the same taps are the rows of one matrix product, so taps outside the arrays are never multiplied, not even by zeros.
// Compiled once for the baseline instruction set; the kernels see plain data.
#pragma once

#include <cstddef>
#include <cstdint>

#include "axis.h"
#include "threads.h"
#include "types.h"

namespace jax_mps {

enum class ConvOp { kForward, kDataGradient, kWeightGradient };

// A checked call. Operands: source and kernel, or image gradient and source.
struct ConvProblem {
  ConvOp op;
  Type type;
  bool wide;  // the result has the accumulator's type
  bool channels_last, transpose_kernel;
  int64_t batch, groups;
  int64_t in, out;  // channels of the windows' side, of the image
  Axis axis[3];
  const void* operand[2];
  void* result;
  const Workers* workers;
};

// The same sums over fewer axes: one that windows do not touch joins its neighbour or the batch, one of a single pixel goes
// first.
ConvProblem Folded(const ConvProblem& problem);

// Targets begin + step * u, u < count, along one axis. For u = 0 tap number t is tap + tap_step * t and reads the source
// source + tap_source * t; both sides advance with u. All of them are in the source, or the segment is a whole phase.
struct Segment {
  int64_t target, step, count;
  int64_t source, source_step;
  int64_t tap, taps, tap_step, tap_source;
};

// The sources along one axis that targets [begin, end) read.
Range SourcesOf(const Axis& axis, bool forward, Range targets);

// The most that any `targets` adjacent ones read.
int64_t MostSources(const Axis& axis, bool forward, int64_t targets);

// How the targets of a gather are cut: segments along each axis, boxes of targets to be worked on together, and panels of
// channels where there are few boxes.
struct GatherPlan {
  const Segment* segment[3];
  int64_t segments[3];
  int64_t targets[4], sources[4];  // batch first
  int64_t box[4], boxes[4];

  // Boxes hold about `pixels` targets. Compact ones have short borders: what they read there is worked on twice.
  // Segments are whole phases, or what of them reads the same taps.
  GatherPlan(const ConvProblem& problem, int64_t pixels, bool compact, bool whole);
  ~GatherPlan();
  GatherPlan(const GatherPlan&) = delete;

  int64_t box_count() const { return boxes[0] * boxes[1] * boxes[2] * boxes[3]; }

 private:
  struct Storage;
  Storage* storage_;
};

// Memory for what all threads read, 64-byte aligned; null if there is none.
class Buffer {
 public:
  explicit Buffer(int64_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

#if defined(__x86_64__) || defined(_M_X64)
namespace x86_64_v2 {
bool Execute(const ConvProblem& problem);
}
namespace x86_64_v3 {
bool Execute(const ConvProblem& problem);
}
namespace x86_64_v4 {
bool Execute(const ConvProblem& problem);
}
#else
namespace baseline {
bool Execute(const ConvProblem& problem);
}
#endif

}  // namespace jax_mps
