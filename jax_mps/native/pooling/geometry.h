// Windows as integers: which sources a target reads, and in which pieces a row of targets is worked through.
//
// Forward, the targets are windows and the sources are pixels; backward it is the other way round. `Plan` speaks of targets
// and sources only: every kernel of pooling is the same gather, run in one of two directions. Backward there are other ways,
// where they take less time: `Strips`, `Bands` and `Tiles`.
// Compiled once for the baseline instruction set; the kernels see plain data.
#pragma once

#include <cstdint>

#include "axis.h"

namespace jax_mps {

struct Geometry {
  int64_t outer = 1, inner = 1;
  Axis axis[3];
  bool weighted = false;  // the average's divisor differs between windows
  int64_t divisor = 1;    // of every window, unless weighted
};

// What one target reads along one axis: `count` sources, `Line::source_step` apart, the first of them through tap `tap`.
struct Reach {
  int64_t source, count, tap;
  int64_t divisor, band;  // forward: number of taps inside the band, and the first of them
};

// An axis as its targets see it.
struct Line {
  Axis axis;
  bool backward;
  int64_t source_step, tap_step;

  Line() = default;
  Line(const Axis& axis, bool backward);
  int64_t targets() const { return backward ? axis.size : axis.windows; }
  int64_t sources() const { return backward ? axis.windows : axis.size; }
  Reach At(int64_t target) const;
  Range Sources(int64_t begin, int64_t end) const;  // all that these targets read
  Range Whole(Range pixels) const;                  // the windows all of whose taps are there
};

// A run: targets of one phase along the last axis that read the same taps. Positions count pixels (of `pitch` elements).
struct Run {
  int64_t target, length;
  int64_t source, first, count;  // source j reads position source + j * advance + offset[first .. first + count)
  int64_t tap, divisor;
};

// A piece of a target row.
struct Chunk {
  int64_t begin, end;                // targets
  int64_t source_begin, source_end;  // all the sources they read
  const Run* runs;
  int64_t run_count;
};

// How a kernel wants to walk.
struct Wishes {
  bool backward;
  bool separable;  // may reduce vertically first, into a row of scratch
  bool whole;      // does so whenever rows pass through scratch anyway; if not, only where that is cheaper
  int64_t lanes;   // vector width
  int64_t width;   // bytes of a scratch element
  int64_t merge;   // what an element of a reduced row costs, in taps
};

struct Plan {
  int64_t outer, inner;
  Line line[3];
  const Reach* reach[2];  // of every target along the first two axes
  bool staged;            // rows are reduced vertically first
  bool phased;            // the strided side of a row passes through scratch, one phase after the other
  bool folded;            // forward, single elements far apart: a window is reduced along its own taps
  bool alone;             // backward: a target reads at most one source of a row
  bool joined;            // consecutive targets of a run are adjacent on both sides
  int64_t block;          // channels worked on together
  int64_t blocks;
  int64_t pitch;                           // elements between neighbouring source positions, as the runs see them
  int64_t source_advance, target_advance;  // positions between consecutive targets of a run
  int64_t rows;                            // scratch rows of a phased, unstaged walk
  int64_t phase_length, span;              // scratch positions of a phase, of a row
  const int64_t* offset;                   // elements from the first tap
  const Chunk* chunks;
  int64_t chunk_count;
  const int64_t* window_divisor[3];  // weighted backward only: taps inside the band, by window

  Plan(const Geometry& geometry, const Wishes& wishes);
  ~Plan();
  Plan(const Plan&) = delete;

  int64_t units() const { return outer * line[0].targets() * line[1].targets() * chunk_count * blocks; }

 private:
  struct Storage;

  void ChooseForm(const Geometry& geometry, const Wishes& wishes);
  int64_t PieceLength(const Wishes& wishes) const;
  void CutChunks(int64_t length);
  void CutRuns(Chunk& chunk);
  void ListOffsets();
  void ListDivisors(const Geometry& geometry);

  Storage* storage_;
};

// A second way to walk backward, for planes of short rows: their ends would be runs of their own, and every row a piece.
// Here a piece is a strip of rows, and reads copies of the windows with some that hold nothing around them, so that all
// targets of a phase read the same taps.
struct Strips {
  int64_t outer, inner;
  Line line[3];                  // along the last two axes with the windows that hold nothing
  int64_t windows[3];            // without them
  int64_t before[3];             // those that hold nothing in front
  int64_t rows;                  // targets of a strip along axis 1: a multiple of the stride
  int64_t count;                 // strips of a plane
  int64_t planes, height, taps;  // the most source planes that a strip reads, rows of each, and taps of a target in a row
  bool worthwhile;

  // Bytes of a source and of a sum.
  Strips(const Geometry& geometry, int64_t lanes, int64_t source_bytes, int64_t sum_bytes);

  int64_t units() const { return outer * line[0].targets() * count; }
  int64_t pitch() const { return line[2].sources() * inner; }
  int64_t copied() const { return (planes * height * pitch() + 1) / 2 * 2; }  // even: what follows is aligned, too
  int64_t sums() const { return line[2].axis.stride * (rows / line[1].axis.stride) * pitch(); }
};

// A third way to walk backward, for few windows a pixel and for windows of many taps: window by window, what one holds is
// added to the pixel of its tap. A piece is a band of the outermost axis that has several pixels, so that it is adjacent
// memory. Windows that reach into two bands are read for both.
struct Bands {
  struct Tap {
    int64_t element, pixel[3];  // from the first tap
  };

  int64_t outer, inner;
  Line line[3];
  int axis;               // which one is cut
  int64_t pitch;          // elements of a pixel along it
  int64_t length, count;  // pixels of a band along it; bands of an image
  int64_t tap_count;
  const Tap* taps;
  bool worthwhile;

  // Lanes of a vector of targets, bytes of a sum in scratch: 0 if the result holds the sums.
  Bands(const Geometry& geometry, int64_t lanes, int64_t scratch_bytes);
  ~Bands();
  Bands(const Bands&) = delete;

  int64_t units() const { return outer * count; }
  int64_t size() const { return length * pitch; }
};

// A way for windows that do not overlap: a pixel belongs to one at most. A piece is some pixels of the rows from a row of
// windows to the next.
struct Tiles {
  int64_t outer, inner;
  Axis axis[3];
  int64_t length, count;  // pixels of a piece; pieces of a row
  Range whole;            // windows of a row that lie inside it
  bool possible;

  explicit Tiles(const Geometry& geometry);
  int64_t units() const { return outer * axis[0].windows * axis[1].windows * count; }
  Range Pixels(int64_t piece) const;
  Range Windows(Range pixels) const;                       // that the pixels of a row belong to, or lie behind
  Range Covered(int a, int64_t window) const;              // the pixels that a window reads
  Range Period(int a, int64_t window) const;               // with those up to the next window
  int64_t Counted(int64_t i, int64_t j, int64_t k) const;  // taps of a window that its average counts
};

// The pixels that no window holds, along each axis, as ranges of neighbours.
struct Unread {
  const Range* ranges[3];
  int64_t count[3];

  explicit Unread(const Geometry& geometry);
  ~Unread();
  Unread(const Unread&) = delete;

 private:
  struct Storage;

  Storage* storage_;
};

// Joins a last axis that one window covers exactly with the axis before it: global pooling becomes one-dimensional.
// Rows of one channel that windows tile without a rest become one row.
void MergeCoveredAxes(Geometry& geometry);

}  // namespace jax_mps
