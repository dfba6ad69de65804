#include "pooling/geometry.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

namespace jax_mps {
namespace {

constexpr int64_t kScratchBytes = 128 << 10;  // of a row: a fraction of the level-2 cache
constexpr int64_t kRowBytes = 64 << 10;       // of a piece that needs no scratch
constexpr int64_t kBandBytes = 1 << 20;       // of the sums of a band that are in scratch
constexpr int64_t kPieceElements = 8 << 10;   // of a piece of a row of tiles
constexpr int64_t kShortRow = 1024;           // elements of a row for strips
constexpr int64_t kFewUnits = 64;             // so many pieces are enough for the threads to share
constexpr int64_t kBlock = 2048;              // channels of a block, where there are more than twice as many

// The taps of the window at `first` that lie in [lower, upper).
Range TapsInside(const Axis& axis, int64_t first, int64_t lower, int64_t upper) {
  const int64_t begin = std::clamp<int64_t>(CeilDiv(lower - first, axis.dilation), 0, axis.taps);
  const int64_t end = std::clamp<int64_t>(CeilDiv(upper - first, axis.dilation), begin, axis.taps);
  return {begin, end};
}

int64_t Divisor(const Axis& axis, int64_t window) {
  const Range band = TapsInside(axis, axis.stride * window - axis.low, -axis.band_low, axis.size + axis.band_high);
  return band.end - band.begin;
}

bool SameTaps(const Reach& a, const Reach& b) {
  return a.count == b.count && a.tap == b.tap && a.divisor == b.divisor && a.band == b.band;
}

// Whether adding what the windows hold, one by one, takes less time than gathering it in vectors. The unit is what one
// window of one channel takes. To gather, a vector of targets takes one unit for eight taps, and what comes before:
//   many channels   one unit for every pixel, or thirty for a row of adjacent pixels
//   few channels    ten for every row, and half a unit a pixel where rows have to be put together from phases. Pairs of
//                   single numbers are put together in vectors.
bool ScatterIsCheaper(const Geometry& geometry, int64_t lanes) {
  constexpr double kTapsOfUnit = 8;
  const Axis& row = geometry.axis[2];
  double windows = 1, pixels = 1, taps = 1;
  for (const Axis& axis : geometry.axis) windows *= axis.windows, pixels *= axis.size, taps *= axis.taps;
  double start;  // units a pixel
  if (geometry.inner >= lanes) {
    start = row.stride == 1 ? std::min(1.0, 30.0 / row.size) : 1;
  } else {
    const bool pairs = row.stride == 2 && geometry.inner == 1;
    start = 10.0 * geometry.axis[0].taps / row.size + (row.stride > 1 && !pairs ? 0.5 : 0);
  }
  const double vectors = windows * geometry.inner / lanes;
  return windows * geometry.inner < pixels * start + vectors * taps / kTapsOfUnit;
}

}  // namespace

Line::Line(const Axis& axis, bool backward) : axis(axis), backward(backward) {
  const int64_t common = std::gcd(axis.stride, axis.dilation);
  source_step = backward ? axis.dilation / common : axis.dilation;
  tap_step = backward ? -axis.stride / common : 1;
}

Reach Line::At(int64_t target) const {
  if (!backward) {
    const int64_t first = axis.stride * target - axis.low;
    const Range taps = TapsInside(axis, first, 0, axis.size);
    const bool wider = axis.band_low != 0 || axis.band_high != 0;
    const Range band = wider ? TapsInside(axis, first, -axis.band_low, axis.size + axis.band_high) : taps;
    return {first + axis.dilation * taps.begin, taps.end - taps.begin, taps.begin, band.end - band.begin, band.begin};
  }
  // stride * window + dilation * tap = target + low. The solutions are source_step windows apart: try that many. One beyond
  // the last window counts as none, but keeps its tap: it tells a target before the windows from one behind them.
  const int64_t sum = target + axis.low;
  const int64_t begin = std::max<int64_t>(0, CeilDiv(sum - axis.dilation * (axis.taps - 1), axis.stride));
  const int64_t end = sum / axis.stride + 1;
  for (int64_t i = begin; i < std::min(begin + source_step, end); ++i) {
    const int64_t rest = sum - axis.stride * i;
    if (rest % axis.dilation == 0) {
      const int64_t beyond = std::min(end, axis.windows) - i;
      return {i, beyond > 0 ? (beyond - 1) / source_step + 1 : 0, rest / axis.dilation, 1, 0};
    }
  }
  return {0, 0, -1, 1, 0};
}

Range Line::Sources(int64_t begin, int64_t end) const {
  const int64_t reach = axis.dilation * (axis.taps - 1);
  const int64_t lower = backward ? CeilDiv(begin + axis.low - reach, axis.stride) : axis.stride * begin - axis.low;
  const int64_t upper =
      backward ? FloorDiv(end - 1 + axis.low, axis.stride) + 1 : axis.stride * (end - 1) - axis.low + reach + 1;
  const int64_t first = std::clamp<int64_t>(lower, 0, sources());
  return {first, std::clamp<int64_t>(upper, first, sources())};
}

Range Line::Whole(Range pixels) const {
  const int64_t reach = axis.dilation * (axis.taps - 1);
  const int64_t begin = std::clamp<int64_t>(CeilDiv(pixels.begin + axis.low, axis.stride), 0, axis.windows);
  const int64_t end = FloorDiv(pixels.end - 1 - reach + axis.low, axis.stride) + 1;
  return {begin, std::clamp<int64_t>(end, begin, axis.windows)};
}

struct Plan::Storage {
  std::vector<int64_t> offset, divisor[3];
  std::vector<Reach> reach[2];
  std::vector<Run> runs;
  std::vector<Chunk> chunks;
};

Plan::Plan(const Geometry& geometry, const Wishes& wishes) : outer(geometry.outer), inner(geometry.inner) {
  for (int a = 0; a < 3; ++a) line[a] = Line(geometry.axis[a], wishes.backward);
  auto storage = std::make_unique<Storage>();  // freed where one of its vectors finds no memory
  storage_ = storage.get();
  ChooseForm(geometry, wishes);
  CutChunks(PieceLength(wishes));
  for (Chunk& chunk : storage_->chunks) CutRuns(chunk);
  const Run* next = storage_->runs.data();
  for (Chunk& chunk : storage_->chunks) {
    chunk.runs = next;
    next += chunk.run_count;
  }
  ListOffsets();
  if (geometry.weighted && wishes.backward) ListDivisors(geometry);
  for (int a = 0; a < 2; ++a) {
    for (int64_t i = 0; i < line[a].targets(); ++i) storage_->reach[a].push_back(line[a].At(i));
    reach[a] = storage_->reach[a].data();
  }
  storage_ = storage.release();
}

// Which passes a row takes on its way from the sources to the targets.
void Plan::ChooseForm(const Geometry& geometry, const Wishes& wishes) {
  const Line& last = line[2];
  const Axis& axis = last.axis;
  const int64_t rows_read = geometry.axis[0].taps * geometry.axis[1].taps;
  block = inner > 2 * kBlock ? kBlock : inner;
  blocks = CeilDiv(inner, block);
  const bool apart = axis.stride >= wishes.lanes && axis.taps >= wishes.lanes;
  folded = wishes.separable && !wishes.backward && inner == 1 && axis.dilation == 1 && (axis.windows == 1 || apart);
  phased = !folded && axis.stride > 1 && inner < wishes.lanes && axis.windows > 1;
  rows = 1;
  for (int a = 0; a < 2; ++a) rows *= std::clamp<int64_t>(geometry.axis[a].size, 1, geometry.axis[a].taps);

  // Reducing rows first costs a pass over all the sources of a row, and saves all but one of the reads of a tap's row. The
  // unit is a vector of taps. A target of few channels that is alone fills its vectors in part (not considered for sums,
  // whose order must not depend on the channels); single elements are moved to their phases one by one, but for pairs.
  const bool forward_split = phased && !wishes.backward;
  const int64_t sources_a_target = wishes.backward ? 1 : axis.stride;
  const bool full = wishes.whole || phased || axis.stride == 1;
  const double reads = axis.taps * (full ? 1.0 : static_cast<double>(CeilDiv(inner, wishes.lanes) * wishes.lanes) / inner);
  const double moves = forward_split ? (axis.stride == 2 && inner == 1 ? 1.0 : 0.5 * wishes.lanes) * axis.stride : 0.0;
  const bool cheaper = rows_read * (reads + moves) > sources_a_target * (rows_read + 1) + wishes.merge * (reads + moves) + 1;
  // Where targets share their only source, what is to be done to it is done once.
  alone = wishes.backward && (axis.windows == 1 || axis.taps <= -last.tap_step);
  staged = (wishes.separable && rows_read > 1 && (cheaper || folded)) ||
           (wishes.whole && (forward_split || (alone && axis.taps > 1) || (geometry.weighted && wishes.backward)));
  // A walk that needs every row of the window split keeps them all in scratch: give that up where they are too many.
  const int64_t window_span = axis.dilation * (axis.taps - 1) + axis.stride * wishes.lanes;
  if (forward_split && !staged && rows * window_span * block * wishes.width > 4 * kScratchBytes) phased = false;
  joined = phased || (axis.stride == 1 && blocks == 1);
  pitch = staged || (phased && !wishes.backward) ? block : inner;
  source_advance = wishes.backward || phased ? 1 : axis.stride;
  target_advance = wishes.backward && !phased ? axis.stride : 1;
}

// Targets of a piece of a row: so few that its scratch stays in the cache.
int64_t Plan::PieceLength(const Wishes& wishes) const {
  const Axis& axis = line[2].axis;
  const bool split = phased && !wishes.backward && !staged;
  const int64_t sources_bytes = block * wishes.width * (split ? rows : 1);
  const int64_t halo = wishes.backward ? axis.taps * axis.dilation / axis.stride : axis.dilation * (axis.taps - 1);
  const int64_t room = (staged || phased ? kScratchBytes : kRowBytes) / sources_bytes;
  int64_t length = std::max(room - halo, std::max(halo, wishes.lanes));
  if (!wishes.backward) length /= axis.stride;
  if (wishes.backward && !phased && !staged) length = kRowBytes / (block * wishes.width);
  const int64_t pieces = CeilDiv(line[2].targets(), std::max<int64_t>(length, 1));
  return CeilDiv(line[2].targets(), std::max<int64_t>(pieces, 1));
}

void Plan::CutChunks(int64_t length) {
  const Line& last = line[2];
  span = 0;
  for (int64_t begin = 0; begin < last.targets(); begin += length) {
    const int64_t end = std::min(begin + length, last.targets());
    const Range sources = last.Sources(begin, end);
    storage_->chunks.push_back({begin, end, sources.begin, sources.end, nullptr, 0});
    span = std::max(span, sources.end - sources.begin);
  }
  // A phase holds every stride-th position, counted from the first tap of the first window or from the first target.
  const Axis& axis = last.axis;
  phase_length = last.backward ? CeilDiv(length, axis.stride) : length + axis.dilation * (axis.taps - 1) / axis.stride;
  chunks = storage_->chunks.data();
  chunk_count = storage_->chunks.size();
}

void Plan::CutRuns(Chunk& chunk) {
  const Line& last = line[2];
  const int64_t phases = last.backward ? last.axis.stride : 1, before = storage_->runs.size();
  for (int64_t phase = 0; phase < std::min(phases, chunk.end - chunk.begin); ++phase) {
    const int64_t in_phase = (chunk.end - chunk.begin - phase - 1) / phases + 1;
    const auto at = [&](int64_t j) { return last.At(chunk.begin + phase + phases * j); };
    for (int64_t j = 0; j < in_phase;) {
      const Reach reach = at(j);
      // The range of taps moves in one direction only along a phase: equal ends mean equal in between.
      int64_t same = j, other = in_phase;
      while (other - same > 1) {
        const int64_t middle = same + (other - same) / 2;
        (SameTaps(reach, at(middle)) ? same : other) = middle;
      }
      const int64_t origin = staged ? chunk.source_begin : 0;
      Run run;
      run.length = other - j;
      run.count = reach.count;
      run.tap = reach.count == 0 ? 0 : reach.tap;
      run.divisor = reach.divisor;
      if (last.backward) {
        run.target = phased ? phase * phase_length + j : chunk.begin + phase + phases * j;
        run.first = 0;
        run.source = reach.source - origin;
      } else {
        run.target = chunk.begin + j;
        run.first = reach.tap;
        run.source = phased ? j : last.axis.stride * (chunk.begin + j) - last.axis.low - origin;
      }
      storage_->runs.push_back(run);
      j = other;
    }
  }
  chunk.run_count = storage_->runs.size() - before;
}

void Plan::ListOffsets() {
  const Line& last = line[2];
  const bool split = phased && !last.backward;
  const int64_t stride = last.axis.stride, count = last.backward ? CeilDiv(last.axis.taps, -last.tap_step) : last.axis.taps;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t position = last.source_step * k;
    storage_->offset.push_back(pitch * (split ? position % stride * phase_length + position / stride : position));
  }
  offset = storage_->offset.data();
}

void Plan::ListDivisors(const Geometry& geometry) {
  for (int a = 0; a < 3; ++a) {
    for (int64_t i = 0; i < geometry.axis[a].windows; ++i) storage_->divisor[a].push_back(Divisor(geometry.axis[a], i));
    window_divisor[a] = storage_->divisor[a].data();
  }
}

Plan::~Plan() { delete storage_; }

Strips::Strips(const Geometry& geometry, int64_t lanes, int64_t source_bytes, int64_t sum_bytes)
    : outer(geometry.outer), inner(geometry.inner) {
  worthwhile = inner < lanes && geometry.axis[1].size > 1 && geometry.axis[2].windows > 1 &&
               geometry.axis[2].size * inner <= kShortRow;
  for (int a = 0; a < 3; ++a) {
    Axis axis = geometry.axis[a];
    windows[a] = axis.windows;
    before[a] = 0;
    if (a > 0) {
      before[a] = std::max<int64_t>(0, -CeilDiv(axis.low - axis.dilation * (axis.taps - 1), axis.stride));
      const int64_t behind = std::max<int64_t>(0, FloorDiv(axis.size - 1 + axis.low, axis.stride) + 1 - axis.windows);
      worthwhile &= before[a] + behind <= axis.windows;
      axis.low += axis.stride * before[a];
      axis.windows += before[a] + behind;
    }
    line[a] = Line(axis, true);
  }
  planes = std::min(CeilDiv(line[0].axis.taps, -line[0].tap_step), windows[0]);
  taps = CeilDiv(line[2].axis.taps, -line[2].tap_step);

  // Of a plane, as much as leaves its copies in the cache and every thread something to do.
  const Axis& axis = line[1].axis;
  const int64_t total = CeilDiv(axis.size, axis.stride), halo = axis.dilation * (axis.taps - 1) / axis.stride;
  const int64_t bytes = pitch() * (planes * source_bytes + line[2].axis.stride * sum_bytes);
  const int64_t fair = outer * line[0].targets() * total / kFewUnits;
  const int64_t group = std::clamp<int64_t>(std::min(kScratchBytes / bytes - halo, fair), std::min(1 + halo, total), total);
  count = CeilDiv(total, group);
  rows = CeilDiv(total, count) * axis.stride;
  count = CeilDiv(axis.size, rows);
  height = 0;
  for (int64_t begin = 0; begin < axis.size; begin += rows) {
    const Range sources = line[1].Sources(begin, std::min(begin + rows, axis.size));
    height = std::max(height, sources.end - sources.begin);
  }
  worthwhile &= copied() * source_bytes + sums() * sum_bytes <= 4 * kScratchBytes;
}

Bands::Bands(const Geometry& geometry, int64_t lanes, int64_t scratch_bytes)
    : outer(geometry.outer), inner(geometry.inner), axis(0), pitch(geometry.inner), tap_count(1), taps(nullptr) {
  const Axis* const a = geometry.axis;
  for (int i = 0; i < 3; ++i) {
    line[i] = Line(a[i], true);
    tap_count *= a[i].taps;
  }
  while (axis < 2 && a[axis].size == 1) ++axis;
  for (int i = axis + 1; i < 3; ++i) pitch *= a[i].size;

  const Axis& cut = a[axis];
  const int64_t halo = cut.dilation * (cut.taps - 1);
  const int64_t room = scratch_bytes == 0 ? cut.size : std::max<int64_t>(1, kBandBytes / (pitch * scratch_bytes));
  length = std::clamp<int64_t>(std::max(4 * halo, outer * cut.size / kFewUnits), 1, std::min(room, cut.size));
  count = CeilDiv(cut.size, length);
  length = CeilDiv(cut.size, count);
  worthwhile = ScatterIsCheaper(geometry, lanes);
  if (!worthwhile) return;

  Tap* const list = new Tap[tap_count];
  for (int64_t t = 0; t < tap_count; ++t) {
    const int64_t number[] = {t / a[2].taps / a[1].taps, t / a[2].taps % a[1].taps, t % a[2].taps};
    for (int i = 0; i < 3; ++i) list[t].pixel[i] = a[i].dilation * number[i];
    list[t].element = ((list[t].pixel[0] * a[1].size + list[t].pixel[1]) * a[2].size + list[t].pixel[2]) * inner;
  }
  taps = list;
}

Bands::~Bands() { delete[] taps; }

struct Unread::Storage {
  std::vector<Range> ranges[3];
};

Unread::Unread(const Geometry& geometry) {
  auto storage = std::make_unique<Storage>();
  for (int a = 0; a < 3; ++a) {
    const Line line(geometry.axis[a], true);
    std::vector<Range>& found = storage->ranges[a];
    for (int64_t i = 0; i < line.targets(); ++i) {
      if (line.At(i).count > 0) continue;
      if (!found.empty() && found.back().end == i) {
        ++found.back().end;
      } else {
        found.push_back({i, i + 1});
      }
    }
    ranges[a] = found.data();
    count[a] = static_cast<int64_t>(found.size());
  }
  storage_ = storage.release();
}

Unread::~Unread() { delete storage_; }

Tiles::Tiles(const Geometry& geometry) : outer(geometry.outer), inner(geometry.inner), possible(true) {
  for (int a = 0; a < 3; ++a) {
    axis[a] = geometry.axis[a];
    possible &= axis[a].dilation == 1 && (axis[a].windows == 1 || axis[a].taps <= axis[a].stride);
  }
  const Axis& row = axis[2];
  length = std::clamp<int64_t>(kPieceElements / inner, 1, row.size);
  if (length > row.stride) length -= length % row.stride;
  count = CeilDiv(row.size, length);
  whole = Line(row, true).Whole({0, row.size});
}

Range Tiles::Pixels(int64_t piece) const { return {piece * length, std::min((piece + 1) * length, axis[2].size)}; }

Range Tiles::Windows(Range pixels) const {
  const Axis& row = axis[2];
  const auto window = [&](int64_t pixel) { return std::min((pixel + row.low) / row.stride, row.windows - 1); };
  return {window(pixels.begin), window(pixels.end - 1) + 1};
}

Range Tiles::Covered(int a, int64_t window) const {
  const int64_t first = axis[a].stride * window - axis[a].low;
  const int64_t begin = std::clamp<int64_t>(first, 0, axis[a].size);
  return {begin, std::clamp<int64_t>(first + axis[a].taps, begin, axis[a].size)};
}

Range Tiles::Period(int a, int64_t window) const {
  const bool last = window + 1 == axis[a].windows;
  return {Covered(a, window).begin, last ? axis[a].size : Covered(a, window + 1).begin};
}

int64_t Tiles::Counted(int64_t i, int64_t j, int64_t k) const {
  return Divisor(axis[0], i) * Divisor(axis[1], j) * Divisor(axis[2], k);
}

void MergeCoveredAxes(Geometry& geometry) {
  Axis* axis = geometry.axis;
  for (int times = 0; times < 2; ++times) {
    Axis& last = axis[2];
    Axis& before = axis[1];
    const bool covered =
        last.windows == 1 && last.low == 0 && last.taps == last.size && (last.dilation == 1 || last.size == 1);
    if (!covered || (before.dilation != 1 && before.taps != 1 && last.size != 1)) break;
    const int64_t width = last.size;
    Axis merged = before;
    for (int64_t Axis::* field : {&Axis::size, &Axis::taps, &Axis::stride, &Axis::low, &Axis::band_low, &Axis::band_high}) {
      merged.*field *= width;
    }
    if (width != 1) merged.dilation = 1;
    axis[2] = merged;
    axis[1] = axis[0];
    axis[0] = Axis();
  }

  const auto trivial = [](const Axis& a) { return a.size == 1 && a.windows == 1 && a.taps == 1 && a.low == 0; };
  Axis& row = axis[2];
  const bool tiled = row.low == 0 && row.windows * row.stride == row.size && row.dilation * (row.taps - 1) < row.stride;
  if (geometry.inner == 1 && trivial(axis[0]) && trivial(axis[1]) && tiled) {
    row.size *= geometry.outer;
    row.windows *= geometry.outer;
    row.band_low = row.band_high = 0;
    geometry.outer = 1;
  }
}

}  // namespace jax_mps
