// The weight gradient of groups of many channels.
//
// One side of a block becomes tiles of columns, packed window by window; the other is read in panels of vectors, where it
// lies if it can be. A tap meets the windows that it reads inside the image, no others; padding is multiplied only where all
// the taps of a row go together.
#pragma once

#include <cstdint>
#include <type_traits>

#include "axis.h"
#include "conv/arrays.h"
#include "conv/geometry.h"
#include "conv/panels.h"
#include "conv/window_rows.h"
#include "isa.h"
#include "simd.h"

namespace jax_mps::JAX_MPS_ISA {
namespace {

// Up to `wide` adjacent columns, and where they go: those of window w to to[w * pitch].
template <class T>
struct Strip {
  int64_t column, count;
  T* to;
  int64_t pitch;
};

// Where there is something to pack, and where memory that can be read ends.
template <class E>
struct Bounds {
  const E *begin, *end, *readable;
};

// Packs strips of `count` windows, from number `at` on, `step` elements apart; zeros for what is out of bounds. Window by
// window, so that memory is read in order; `wide` numbers at a time: what that is too much, the next window overwrites, or
// the last one leaves behind its strip.
template <int wide, class E, class T>
inline void PackStrips(const E* from, const Bounds<E>& bounds, int64_t step, int64_t at, int64_t count,
                       List<Strip<T>> strips) {
  const Strip<T>& last = strips.first[strips.number - 1];
  const int64_t least = bounds.begin - from - strips.first->column;
  const int64_t most = Least(bounds.end - from - last.column - last.count, bounds.readable - from - last.column - wide);
  for (int64_t w = 0; w < count; ++w, ++at, from += step) {
    if (w * step >= least && w * step <= most) {
      for (const Strip<T>& s : strips) StoreRaw<wide>(s.to + at * s.pitch, Load<T, wide>(from + s.column));
    } else {
      for (const Strip<T>& s : strips) {
        for (int64_t c = s.column; c < s.column + s.count; ++c) {
          const bool inside = from + c >= bounds.begin && from + c < bounds.end;
          s.to[at * s.pitch + c - s.column] = inside ? Load<T, 1>(from + c)[0] : 0;
        }
      }
    }
  }
}

// A row of weights: where it reads and which of the sums are its own.
template <class T>
struct WeightRow {
  const T* from;
  int64_t to;
};

// Some windows: the first one's elements in the rows and in the panel.
struct Stretch {
  int64_t row, panel, count;
};

// sums[r][v] += from[r][window] * panel[window][v], over the windows. If `packed`, the rows are adjacent window by window.
template <bool packed, int R, int V, class T>
__attribute__((noinline, flatten)) void MultiplyBlock(List<Stretch> stretches, const WeightRow<T>* rows, int64_t row_step,
                                                      const T* panel, int64_t panel_step, T* sums) {
  constexpr int kN = kLanes<T>;
  if constexpr (packed) row_step = R;  // the same, as a constant
  Vec<T, kN> sum[R][V];
  const T* from[R];
  Unroll<R>([&](int r) {
    from[r] = rows[r].from;
    Unroll<V>([&](int v) { sum[r][v] = Vec<T, kN>{}; });
  });
  for (const Stretch& stretch : stretches) {
    const T* lanes = panel + stretch.panel;
    const int64_t end = stretch.row + stretch.count * row_step;
    for (int64_t i = stretch.row; i < end; i += row_step, lanes += panel_step) {
      Vec<T, kN> vector[V];
      Unroll<V>([&](int v) { vector[v] = LoadRaw<T, kN>(lanes + v * kN); });
      Unroll<R>([&](int r) {
        const auto element = Broadcast<T, kN>(packed ? from[0][i + r] : from[r][i]);
        Unroll<V>([&](int v) { sum[r][v] += element * vector[v]; });
      });
    }
  }
  Unroll<R * V>([&](int i) {
    T* to = sums + rows[i / V].to + i % V * kN;
    StoreRaw<kN>(to, LoadRaw<T, kN>(to) + sum[i / V][i % V]);
  });
}

template <bool packed, int V = kPanel, int R = TileRows(V), class T>
inline void MultiplyBlock(int64_t height, int64_t vectors, List<Stretch> stretches, const WeightRow<T>* rows,
                          int64_t row_step, const T* panel, int64_t panel_step, T* sums) {
  if constexpr (V > 1) {
    if (vectors < V)
      return MultiplyBlock<packed, V - 1>(height, vectors, stretches, rows, row_step, panel, panel_step, sums);
  }
  if constexpr (R > 1) {
    if (height < R)
      return MultiplyBlock<packed, V, R - 1>(height, vectors, stretches, rows, row_step, panel, panel_step, sums);
  }
  MultiplyBlock<packed, R, V>(stretches, rows, row_step, panel, panel_step, sums);
}

// Many weights, one unit of work a block of them: [tile][panel][row][lane]. The columns of the image are those of a run of
// taps: one, or a row of the kernel where that fills tiles and panels better.
template <class E, class T>
struct WeightTask {
  using Sum = T;
  static constexpr int kN = kLanes<T>;
  static constexpr int64_t kTile = kRows * kPanel * kN;  // sums

  const ConvProblem& problem;
  KernelLayout layout;
  Array<const E> image, source;
  int64_t in, out;   // channels of a group
  bool image_lanes;  // else the image becomes rows
  bool* unfit;       // set where padding would meet a number that is not finite: the sums are wrong then
  int64_t run_taps, runs, height, tiles_of_run, tiles, row_blocks, panels, lane_blocks;

  WeightTask(const ConvProblem& problem, const Array<const E>& image, const Array<const E>& source, bool image_lanes,
             int64_t run_taps, bool* unfit)
      : problem(problem),
        layout(LayoutOf(problem)),
        image(image),
        source(source),
        in(problem.in / problem.groups),
        out(problem.out / problem.groups),
        image_lanes(image_lanes),
        unfit(unfit),
        run_taps(run_taps),
        runs(TapCount(problem) / run_taps) {
    height = TileRows(static_cast<int>(Most(1, Least(kPanel, lanes().whole()))));
    tiles_of_run = (rows() + height - 1) / height;
    tiles = tiles_of_run * (image_lanes ? 1 : runs);
    panels = lanes().panels() * (image_lanes ? runs : 1);
    // What a block packs, and its sums, share a level-2 cache.
    constexpr int64_t kRowsOfBlock = 144;
    row_blocks = (tiles * height + kRowsOfBlock - 1) / kRowsOfBlock;
    if (row_blocks > 4) row_blocks = RoundUp(row_blocks, 4);  // shares of equal size
    const int64_t most = Most(1, kCacheBytes / (tiles_of_block() * kTile * static_cast<int64_t>(sizeof(T))));
    lane_blocks = (panels + most - 1) / most;
  }

  int64_t rows() const { return image_lanes ? in : run_taps * out; }  // of a run
  Lanes<T> lanes() const { return {image_lanes ? run_taps * out : in}; }
  int64_t tiles_of_block() const { return (tiles + row_blocks - 1) / row_blocks; }
  int64_t panels_of_block() const { return (panels + lane_blocks - 1) / lane_blocks; }
  // 16 more: for what PackStrips leaves behind, and so that the tiles do not share sets of the cache.
  int64_t tile_room() const { return height * kBlock + 16; }

  Range RowsAt(int64_t tile) const {
    const int64_t i = tile % tiles_of_run;
    return {rows() * i / tiles_of_run, rows() * (i + 1) / tiles_of_run};
  }
  Panel PanelAt(int64_t q) const { return lanes().panel(q % lanes().panels()); }
  Range LanesAt(const Panel& panel) const { return {panel.start, Least(panel.start + panel.vectors * kN, lanes().count)}; }
  int64_t RunAt(int64_t tile, int64_t panel) const { return image_lanes ? panel / lanes().panels() : tile / tiles_of_run; }

  struct Block {
    int64_t group;
    Range tiles, panels;
  };
  Block BlockAt(int64_t unit) const {
    const int64_t lane_block = unit % lane_blocks, row_block = unit / lane_blocks % row_blocks;
    return {unit / lane_blocks / row_blocks,
            {tiles * row_block / row_blocks, tiles * (row_block + 1) / row_blocks},
            {panels * lane_block / lane_blocks, panels * (lane_block + 1) / lane_blocks}};
  }

  // Whether windows of a run stick out of the image.
  bool Padded() const {
    const Axis& axis = problem.axis[2];
    return run_taps > 1 && (axis.low > 0 || axis.stride * (axis.windows - 1) - axis.low + axis.taps > axis.size);
  }
  // Elements from a window's lanes to the next one's.
  int64_t LaneStep() const { return image_lanes ? problem.axis[2].stride * image.channels : source.channels; }
  // Whether panels are read where they lie: not if their vectors would compete for few sets of the cache.
  bool Direct() const {
    constexpr int64_t kMostBytes = 2048;
    return std::is_same_v<E, T> && lanes().count >= kN && LaneStep() * static_cast<int64_t>(sizeof(E)) <= kMostBytes &&
           !(image_lanes && Padded());
  }

  int64_t units() const { return problem.groups * row_blocks * lane_blocks; }
  int64_t parts() const { return tiles_of_block(); }
  int64_t part_size() const { return panels_of_block() * kTile; }
  int64_t scratch() const {
    const int64_t numbers = tiles_of_block() * tile_room() + kBlock * kPanel * kN;
    return numbers * sizeof(T) + tiles_of_block() * sizeof(Strip<T>) +
           kBlock * (sizeof(WindowRow) + sizeof(Span) + sizeof(Stretch));
  }

  TapReach ReachOf(int64_t run) const {
    TapReach reach(problem, run * run_taps);
    if (run_taps > 1) reach.windows[2] = {0, problem.axis[2].windows};
    return reach;
  }

  struct Room {
    T *rows, *panel;
    Strip<T>* strips;
    WindowRow* window_rows;
    Span* spans;
    Stretch* stretches;
  };
  Room RoomIn(void* scratch) const {
    Room room;
    room.rows = static_cast<T*>(scratch);
    room.panel = room.rows + tiles_of_block() * tile_room();
    room.strips = reinterpret_cast<Strip<T>*>(room.panel + kBlock * kPanel * kN);
    room.window_rows = reinterpret_cast<WindowRow*>(room.strips + tiles_of_block());
    room.spans = reinterpret_cast<Span*>(room.window_rows + kBlock);
    room.stretches = reinterpret_cast<Stretch*>(room.spans + kBlock);
    return room;
  }

  // A block of windows while it is worked on: its first source, its image, its rows, and what run `listed` meets of them.
  struct Some {
    int64_t count;
    const E *source, *image;
    List<WindowRow> window_rows;
    Span* room;
    List<Span> spans;
    int64_t listed;
  };

  void ListSpans(int64_t run, Some& some) const {
    if (some.listed == run) return;
    some.listed = run;
    int64_t number = 0;
    const TapReach reach = ReachOf(run);
    for (const WindowRow& window_row : some.window_rows) {
      const Span span = reach.At(problem, image, window_row);
      if (span.count > 0) some.room[number++] = span;
    }
    some.spans = {some.room, number};
  }

  // Strips of the image's windows that the listed run reaches, or of the source's.
  template <int wide>
  void PackSide(bool of_image, const Some& some, List<Strip<T>> strips) const {
    if (!of_image) {
      const E* const end = source.data + problem.batch * source.pixels() * source.channels;
      return PackStrips<wide>(some.source, Bounds<E>{source.data, end, end}, source.channels, 0, some.count, strips);
    }
    const E* const end = image.data + problem.batch * image.pixels() * image.channels;
    const int64_t step = problem.axis[2].stride * image.channels, line = image.size[2] * image.channels;
    for (const Span& span : some.spans) {
      const E* row = image.data + span.row * line;
      PackStrips<wide>(some.image + span.pixel, Bounds<E>{row, row + line, end}, step, span.at, span.count, strips);
    }
  }

  void PackRows(Range t, const Room& room, Some& some) const {
    for (int64_t i = t.begin, next; i < t.end; i = next) {
      next = image_lanes ? t.end : Least(t.end, (i / tiles_of_run + 1) * tiles_of_run);
      if (!image_lanes) ListSpans(i / tiles_of_run, some);
      const List<Strip<T>> strips = {room.strips + i - t.begin, next - i};
      height > 8 ? PackSide<16>(!image_lanes, some, strips) : PackSide<8>(!image_lanes, some, strips);
    }
  }

  // The lanes of a panel: where they lie, or packed.
  const T* PanelOf(const Panel& panel, const Room& room, const Some& some) const {
    if constexpr (std::is_same_v<E, T>) {
      if (Direct()) return (image_lanes ? some.image : some.source) + panel.start;
    }
    Strip<T> vectors[kPanel];
    for (int64_t v = 0; v < panel.vectors; ++v) {
      vectors[v] = {panel.start + v * kN, Least(kN, lanes().count), room.panel + v * kN, panel.vectors * kN};
    }
    PackSide<kN>(image_lanes, some, {vectors, panel.vectors});
    return room.panel;
  }

  void Work(int64_t unit, Range windows, T* sums, void* scratch) const {
    const auto [group, t, p] = BlockAt(unit);
    const Room room = RoomIn(scratch);
    for (int64_t i = t.begin; i < t.end; ++i) {
      const auto [begin, end] = RowsAt(i);
      room.strips[i - t.begin] = {begin, end - begin, room.rows + (i - t.begin) * tile_room(), end - begin};
    }
    for (int64_t begin = windows.begin; begin < windows.end; begin += kBlock) {
      const int64_t count = Least(kBlock, windows.end - begin);
      Some some = {count,
                   source.data + group * in + begin * source.channels,
                   image.data + group * out,
                   {room.window_rows, 0},
                   room.spans,
                   {room.spans, 0},
                   -1};
      some.window_rows.number = ListWindowRows(problem, {begin, begin + count}, room.window_rows);
      if (Padded() && !Finite(some.source, count * source.channels)) {
        // Zeros of the padding times this would not be zeros.
        __atomic_store_n(unfit, true, __ATOMIC_RELAXED);
        return;
      }
      PackRows(t, room, some);
      for (int64_t q = p.begin; q < p.end; ++q) MultiplyTiles(t, q, room, some, sums + (q - p.begin) * kTile);
    }
  }

  // Adds the products of a panel and all tiles to their sums.
  void MultiplyTiles(Range t, int64_t q, const Room& room, Some& some, T* sums) const {
    const Panel panel = PanelAt(q);
    const int64_t pitch = panel.vectors * kN, step = Direct() ? LaneStep() : pitch;
    const bool in_image = Direct() && image_lanes;
    if (image_lanes) ListSpans(RunAt(0, q), some);
    const T* const from = PanelOf(panel, room, some);
    for (int64_t i = t.begin; i < t.end; ++i) {
      const Strip<T>& strip = room.strips[i - t.begin];
      ListSpans(RunAt(i, q), some);
      for (int64_t s = 0; s < some.spans.number; ++s) {
        const Span& span = some.spans.first[s];
        room.stretches[s] = {span.at * strip.count, in_image ? span.pixel : span.at * step, span.count};
      }
      WeightRow<T> tile[TileRows(1)];
      for (int64_t r = 0; r < strip.count; ++r) tile[r] = {strip.to + r, r * pitch};
      MultiplyBlock<true>(strip.count, panel.vectors, {room.stretches, some.spans.number}, tile, strip.count, from, step,
                          sums + (i - t.begin) * part_size());
    }
  }

  template <class R>
  void Emit(int64_t unit, int64_t part, const T* sums, R* result) const {
    const auto [group, t, p] = BlockAt(unit);
    const int64_t i = t.begin + part;
    if (i >= t.end) return;
    R* const of_group = result + layout.base + group * layout.group;
    for (int64_t q = p.begin; q < p.end; ++q, sums += kTile) {
      const Panel panel = PanelAt(q);
      const Range rows = RowsAt(i), lanes = LanesAt(panel);
      const int64_t pitch = panel.vectors * kN, shared = panel.shared(kN);
      const auto [begin, end] = image_lanes ? lanes : rows;
      for (int64_t column = begin + (image_lanes ? shared : 0), next; column < end; column = next) {
        const int64_t k = column / out;
        next = Least(end, (k + 1) * out);
        R* to = of_group + (RunAt(i, q) * run_taps + k) * layout.tap + (column - k * out) * layout.out;
        if (image_lanes) {
          CopyMatrix<T>(rows.end - rows.begin, next - column, sums + column - begin, pitch, 1, to + rows.begin * layout.in,
                        layout.in, layout.out);
        } else {
          CopyMatrix<T>(next - column, lanes.end - lanes.begin - shared, sums + (column - begin) * pitch + shared, pitch, 1,
                        to + (lanes.begin + shared) * layout.in, layout.out, layout.in);
        }
      }
    }
  }
};

// Few weights: their operands are read where they lie, as packing them would take as long as the products.
// [panel][row][lane]
template <class T>
struct DirectTask {
  using Sum = T;
  static constexpr int kN = kLanes<T>;
  static constexpr int64_t kPitch = kPanel * kN;  // sums of a row in a panel

  const ConvProblem& problem;
  KernelLayout layout;
  Array<const T> image, source;
  int64_t out, rows;  // channels of a group; weights of a lane
  Lanes<T> lanes;

  DirectTask(const ConvProblem& problem, const Array<const T>& image, const Array<const T>& source)
      : problem(problem),
        layout(LayoutOf(problem)),
        image(image),
        source(source),
        out(problem.out / problem.groups),
        rows(TapCount(problem) * out),
        lanes{problem.in / problem.groups} {}

  int64_t units() const { return problem.groups; }
  int64_t parts() const { return lanes.panels(); }
  int64_t part_size() const { return rows * kPitch; }
  int64_t scratch() const {
    return kBlock * sizeof(WindowRow) + rows * sizeof(Meeting) + problem.axis[2].taps * sizeof(Range);
  }

  // The windows that a row of weights meets inside the image, and the element that the first window of their row would have.
  struct Meeting {
    Range windows;
    int64_t first, row;
  };

  void Work(int64_t group, Range windows, T* sums, void* scratch) const {
    WindowRow* const window_rows = static_cast<WindowRow*>(scratch);
    Meeting* const meetings = reinterpret_cast<Meeting*>(window_rows + kBlock);
    Range* const reached = reinterpret_cast<Range*>(meetings + rows);
    for (int64_t k = 0; k < problem.axis[2].taps; ++k) reached[k] = Reached(problem.axis[2], k);
    for (int64_t begin = windows.begin; begin < windows.end; begin += kBlock) {
      const Range block = {begin, Least(begin + kBlock, windows.end)};
      for (const WindowRow& window_row : List<WindowRow>{window_rows, ListWindowRows(problem, block, window_rows)}) {
        const T* line = source.data + source.row(window_row.batch, window_row.plane, window_row.line) +
                        window_row.begin * source.channels;
        const List<Meeting> met = {meetings, ListMeetings(window_row, reached, meetings)};
        Add(window_row.count, image.data + group * out, line + group * lanes.count, met, sums);
      }
    }
  }

  int64_t ListMeetings(const WindowRow& window_row, const Range* reached, Meeting* meetings) const {
    const Axis* axis = problem.axis;
    int64_t number = 0, row = 0;
    for (int64_t k0 = 0; k0 < axis[0].taps; ++k0) {
      const int64_t i = axis[0].stride * window_row.plane - axis[0].low + axis[0].dilation * k0;
      for (int64_t k1 = 0; k1 < axis[1].taps; ++k1, row += axis[2].taps * out) {
        const int64_t j = axis[1].stride * window_row.line - axis[1].low + axis[1].dilation * k1;
        if (i < 0 || i >= axis[0].size || j < 0 || j >= axis[1].size) continue;
        int64_t first =
            image.row(window_row.batch, i, j) + (axis[2].stride * window_row.begin - axis[2].low) * image.channels;
        for (int64_t k2 = 0; k2 < axis[2].taps; ++k2, first += axis[2].dilation * image.channels) {
          const Range windows = {Most(0, reached[k2].begin - window_row.begin),
                                 Least(window_row.count, reached[k2].end - window_row.begin)};
          if (windows.begin >= windows.end) continue;
          for (int64_t c = 0; c < out; ++c) meetings[number++] = {windows, first + c, row + k2 * out + c};
        }
      }
    }
    return number;
  }

  void Add(int64_t windows, const T* image_data, const T* line, List<Meeting> met, T* sums) const {
    const int64_t row_step = problem.axis[2].stride * image.channels, lane_step = source.channels;
    // With one vector of lanes, more rows: a product must not wait for the sum before it.
    const int64_t most = lanes.whole() > 1 ? kRows : ScatteredRows(1), tiles = (met.number + most - 1) / most;
    const int64_t height = tiles > 0 ? (met.number + tiles - 1) / tiles : 0;
    for (const Meeting *first = met.begin(), *last; first != met.end(); first = last) {
      last = first + Least(height, met.end() - first);
      Range all = {0, windows};  // of all rows
      WeightRow<T> tile[TileRows(1)];
      for (const Meeting* m = first; m != last; ++m) {
        tile[m - first] = {image_data + m->first, m->row * kPitch};
        all = {Most(all.begin, m->windows.begin), Least(all.end, m->windows.end)};
      }
      if (all.begin >= all.end) all = {0, 0};
      for (int64_t q = 0; q < lanes.panels(); ++q) {
        const Panel panel = lanes.panel(q);
        const auto multiply = [&](const Meeting* from, int64_t n, int64_t begin, int64_t end) {
          if (begin >= end) return;
          const Stretch stretch = {begin * row_step, begin * lane_step, end - begin};
          MultiplyBlock<false>(n, panel.vectors, {&stretch, 1}, tile + (from - first), row_step, line + panel.start,
                               lane_step, sums + q * part_size());
        };
        multiply(first, last - first, all.begin, all.end);
        // What is inside for some rows alone; neighbours that agree go together.
        for (const Meeting *m = first, *next; m != last; m = next) {
          const Range mine = m->windows;
          for (next = m + 1; next != last && next->windows.begin == mine.begin && next->windows.end == mine.end;) ++next;
          multiply(m, next - m, mine.begin, all.end > 0 ? all.begin : mine.end);
          if (all.end > 0) multiply(m, next - m, all.end, mine.end);
        }
      }
    }
  }

  template <class R>
  void Emit(int64_t group, int64_t q, const T* sums, R* result) const {
    const Panel panel = lanes.panel(q);
    const int64_t shared = panel.shared(kN);
    R* to = result + layout.base + group * layout.group + (panel.start + shared) * layout.in;
    for (int64_t tap = 0; tap < TapCount(problem); ++tap, sums += out * kPitch, to += layout.tap) {
      CopyMatrix<T>(out, panel.vectors * kN - shared, sums + shared, kPitch, 1, to, layout.out, layout.in);
    }
  }
};

}  // namespace
}  // namespace jax_mps::JAX_MPS_ISA
