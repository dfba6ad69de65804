// The weight gradient: dW[tap, out, in] = sum over windows of image[pixel(window, tap), out] * source[window, in].
//
// Windows are worked on in blocks. One side of a block becomes tiles of columns, packed window by window; the other is read in
// panels of vectors, where it lies if it can be. A tap meets the windows that it reads inside the image, no others; padding is
// multiplied only where all the taps of a row go together, and not where a number is not finite. Many windows and few weights
// are split among tasks, whose partial sums are added in a fixed order.

constexpr int64_t kBlock = 256;  // windows

// Windows [begin, begin + count) of the row (plane, line) of image `batch`; the first of them is number `at` of its block.
struct Piece {
  int64_t batch, plane, line, begin, count, at;
};

// Lists the pieces of a range of windows; as many as there are windows at most.
inline int64_t ListPieces(const ConvProblem& p, Interval windows, Piece* pieces) {
  const int64_t width = p.axis[2].windows;
  int64_t number = 0;
  for (int64_t w = windows.begin; w < windows.end; ++number) {
    const int64_t line = w / width, begin = w % width;
    const int64_t count = Least(width - begin, windows.end - w);
    pieces[number] = {line / p.axis[1].windows / p.axis[0].windows, line / p.axis[1].windows % p.axis[0].windows,
                      line % p.axis[1].windows, begin, count, w - windows.begin};
    w += count;
  }
  return number;
}

template <class Item>
struct List {
  const Item* first;
  int64_t number;
  const Item* begin() const { return first; }
  const Item* end() const { return first + number; }
};

// `count` windows of a block from number `at` on, whose pixels for a tap are in one row of the images: the first one's begins
// with element `pixel`.
struct Span {
  int64_t at, count, pixel, row;
};

// The windows of an axis that a tap meets inside the image.
inline Interval Reached(const ConvAxis& axis, int64_t tap) {
  const int64_t first = axis.dilation * tap - axis.lo;
  const int64_t begin = first >= 0 ? 0 : Least(axis.windows, (axis.stride - 1 - first) / axis.stride);
  return {begin, first >= axis.pixels ? begin : Most(begin, Least(axis.windows, (axis.pixels - 1 - first) / axis.stride + 1))};
}

// Where a tap meets the image: the windows of each axis, and the pixels of window 0.
struct Reach {
  Interval windows[3];
  int64_t pixel[3];

  Reach(const ConvProblem& p, int64_t tap) {
    for (int a = 2; a >= 0; --a) {
      const int64_t k = tap % p.axis[a].kernel;
      tap /= p.axis[a].kernel;
      windows[a] = Reached(p.axis[a], k);
      pixel[a] = p.axis[a].dilation * k - p.axis[a].lo;
    }
  }

  template <class E>
  Span At(const ConvProblem& p, const Array<const E>& image, const Piece& piece) const {
    const int64_t i = piece.plane, j = piece.line;
    const int64_t begin = Most(piece.begin, windows[2].begin), end = Least(piece.begin + piece.count, windows[2].end);
    if (begin >= end || i < windows[0].begin || i >= windows[0].end || j < windows[1].begin || j >= windows[1].end) return {0, 0, 0, 0};
    const int64_t plane = piece.batch * image.size[0] + p.axis[0].stride * i + pixel[0];
    const int64_t row = plane * image.size[1] + p.axis[1].stride * j + pixel[1];
    const int64_t first = row * image.size[2] + p.axis[2].stride * begin + pixel[2];
    return {piece.at + begin - piece.begin, end - begin, first * image.channels, row};
  }
};

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

// Packs strips of `count` windows, from number `at` on, `step` elements apart; zeros for what is out of bounds. Window by window,
// so that memory is read in order; `wide` numbers at a time: what that is too much, the next window overwrites, or the last one
// leaves behind its strip.
template <int wide, class E, class T>
inline void Pack(const E* from, const Bounds<E>& bounds, int64_t step, int64_t at, int64_t count, List<Strip<T>> strips) {
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

template <bool packed, int V = kPanel, int R = RowsOf(V), class T>
inline void MultiplyBlock(int64_t height, int64_t vectors, List<Stretch> stretches, const WeightRow<T>* rows, int64_t row_step,
                          const T* panel, int64_t panel_step, T* sums) {
  if constexpr (V > 1) {
    if (vectors < V) return MultiplyBlock<packed, V - 1>(height, vectors, stretches, rows, row_step, panel, panel_step, sums);
  }
  if constexpr (R > 1) {
    if (height < R) return MultiplyBlock<packed, V, R - 1>(height, vectors, stretches, rows, row_step, panel, panel_step, sums);
  }
  MultiplyBlock<packed, R, V>(stretches, rows, row_step, panel, panel_step, sums);
}

// Many weights, one unit of work a block of them: [tile][panel][row][lane]. The columns of the image are those of a run of taps:
// one, or a row of the kernel where that fills tiles and panels better.
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
  int64_t run_taps, runs, height, tiles_of_run, tiles, row_blocks, panels, lane_blocks;

  WeightTask(const ConvProblem& problem, const Array<const E>& image, const Array<const E>& source, bool image_lanes,
             int64_t run_taps)
      : problem(problem), layout(LayoutOf(problem)), image(image), source(source), in(problem.in / problem.groups),
        out(problem.out / problem.groups), image_lanes(image_lanes), run_taps(run_taps), runs(Taps(problem) / run_taps) {
    height = RowsOf(static_cast<int>(Most(1, Least(kPanel, lanes().whole()))));
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
  // 16 more: for what Pack leaves behind, and lest the tiles share sets of the cache.
  int64_t tile_room() const { return height * kBlock + 16; }

  Interval RowsAt(int64_t tile) const {
    const int64_t i = tile % tiles_of_run;
    return {rows() * i / tiles_of_run, rows() * (i + 1) / tiles_of_run};
  }
  Panel PanelAt(int64_t q) const { return lanes().panel(q % lanes().panels()); }
  Interval LanesAt(const Panel& panel) const { return {panel.start, Least(panel.start + panel.vectors * kN, lanes().count)}; }
  int64_t RunAt(int64_t tile, int64_t panel) const { return image_lanes ? panel / lanes().panels() : tile / tiles_of_run; }

  struct Block {
    int64_t group;
    Interval tiles, panels;
  };
  Block BlockAt(int64_t unit) const {
    const int64_t lane_block = unit % lane_blocks, row_block = unit / lane_blocks % row_blocks;
    return {unit / lane_blocks / row_blocks,
            {tiles * row_block / row_blocks, tiles * (row_block + 1) / row_blocks},
            {panels * lane_block / lane_blocks, panels * (lane_block + 1) / lane_blocks}};
  }

  // Cycles a window: two multiplications of vectors in each, but at least four for a tile and a panel, about three for a strip of
  // a row and, where panels are copied, two for a vector. Rows that are not adjacent in the result cost one a weight.
  double Cost(int64_t windows) const {
    double tile = 0;
    for (int64_t q = 0; q < lanes().panels(); ++q) {
      tile += Most(8, lanes().panel(q).vectors * ((rows() + tiles_of_run - 1) / tiles_of_run)) / 2.0;
    }
    const double strips = 3.0 * tiles * lane_blocks;
    const double vectors = Direct() ? 0 : 2.0 * lanes().vectors() * panels / lanes().panels() * row_blocks;
    const double weights = static_cast<double>(Taps(problem)) * in * out;
    return runs * tiles_of_run * tile + strips + vectors + ((image_lanes ? layout.out : layout.in) == 1 ? 0 : weights / windows);
  }

  // Whether windows of a run stick out of the image.
  bool Padded() const {
    const ConvAxis& axis = problem.axis[2];
    return run_taps > 1 && (axis.lo > 0 || axis.stride * (axis.windows - 1) - axis.lo + axis.kernel > axis.pixels);
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
    return numbers * sizeof(T) + tiles_of_block() * sizeof(Strip<T>) + kBlock * (sizeof(Piece) + sizeof(Span) + sizeof(Stretch));
  }

  Reach ReachOf(int64_t run) const {
    Reach reach(problem, run * run_taps);
    if (run_taps > 1) reach.windows[2] = {0, problem.axis[2].windows};
    return reach;
  }

  static bool Finite(const E* numbers, int64_t count) {
    Vec<T, kN> sum[4] = {};
    Sweep<kN>(count, [&](auto lanes, auto vectors, int64_t i) {
      constexpr int kSome = decltype(lanes)::value;
      for (int v = 0; v < decltype(vectors)::value; ++v) {
        const auto number = Load<T, kSome>(numbers + i + v * kSome);
        if constexpr (kSome == kN) {
          sum[v] += number - number;
        } else {
          for (int lane = 0; lane < kSome; ++lane) sum[0][lane] += number[lane] - number[lane];
        }
      }
    });
    bool finite = true;
    for (int lane = 0; lane < kN; ++lane) finite &= sum[0][lane] + sum[1][lane] + sum[2][lane] + sum[3][lane] == 0;
    return finite;
  }

  void Work(int64_t unit, Interval windows, T* sums, void* scratch) const {
    const auto [group, t, p] = BlockAt(unit);
    T* const packed_rows = static_cast<T*>(scratch);
    T* const packed_panel = packed_rows + tiles_of_block() * tile_room();
    Strip<T>* const strips = reinterpret_cast<Strip<T>*>(packed_panel + kBlock * kPanel * kN);
    Piece* const pieces = reinterpret_cast<Piece*>(strips + tiles_of_block());
    Span* const spans = reinterpret_cast<Span*>(pieces + kBlock);
    Stretch* const stretches = reinterpret_cast<Stretch*>(spans + kBlock);
    for (int64_t i = t.begin; i < t.end; ++i) {
      const auto [begin, end] = RowsAt(i);
      strips[i - t.begin] = {begin, end - begin, packed_rows + (i - t.begin) * tile_room(), end - begin};
    }

    const E* const image_data = image.data + group * out;
    const E* const image_end = image.data + problem.batch * image.pixels() * image.channels;
    const E* const source_end = source.data + problem.batch * source.pixels() * source.channels;
    const int64_t image_step = problem.axis[2].stride * image.channels, line = image.size[2] * image.channels;
    const bool direct = Direct(), padded = Padded();
    for (int64_t begin = windows.begin; begin < windows.end; begin += kBlock) {
      const int64_t count = Least(kBlock, windows.end - begin);
      const List<Piece> block = {pieces, ListPieces(problem, {begin, begin + count}, pieces)};
      const E* const block_source = source.data + group * in + begin * source.channels;
      if (padded && !Finite(block_source, count * source.channels)) {
        AddOneByOne(t, p, block, image_data, block_source, sums);
        continue;
      }
      List<Span> run_spans = {spans, 0};
      int64_t listed = -1;
      const auto list = [&](int64_t run) {
        if (listed == run) return;
        listed = run;
        run_spans.number = 0;
        const Reach reach = ReachOf(run);
        for (const Piece& piece : block) {
          const Span span = reach.At(problem, image, piece);
          if (span.count > 0) spans[run_spans.number++] = span;
        }
      };
      // Strips of the image's windows that a run reaches, or of the source's.
      const auto pack = [&](auto wide, bool of_image, List<Strip<T>> some) {
        constexpr int kWide = decltype(wide)::value;
        if (!of_image) {
          return Pack<kWide>(block_source, Bounds<E>{source.data, source_end, source_end}, source.channels, 0, count, some);
        }
        for (const Span& span : run_spans) {
          const E* row = image.data + span.row * line;
          Pack<kWide>(image_data + span.pixel, Bounds<E>{row, row + line, image_end}, image_step, span.at, span.count, some);
        }
      };
      for (int64_t i = t.begin, next; i < t.end; i = next) {
        next = image_lanes ? t.end : Least(t.end, (i / tiles_of_run + 1) * tiles_of_run);
        if (!image_lanes) list(i / tiles_of_run);
        const List<Strip<T>> some = {strips + i - t.begin, next - i};
        height > 8 ? pack(Int<16>(), !image_lanes, some) : pack(Int<8>(), !image_lanes, some);
      }
      for (int64_t q = p.begin; q < p.end; ++q) {
        const Panel panel = PanelAt(q);
        const int64_t pitch = panel.vectors * kN;
        const T* from = packed_panel;
        int64_t step = pitch;
        if (image_lanes) list(RunAt(0, q));
        if (direct) {
          if constexpr (std::is_same_v<E, T>) from = (image_lanes ? image_data : block_source) + panel.start;
          step = LaneStep();
        } else {
          Strip<T> vectors[kPanel];
          for (int64_t v = 0; v < panel.vectors; ++v) {
            vectors[v] = {panel.start + v * kN, Least(kN, lanes().count), packed_panel + v * kN, pitch};
          }
          pack(Int<kN>(), image_lanes, {vectors, panel.vectors});
        }
        for (int64_t i = t.begin; i < t.end; ++i) {
          const Strip<T>& strip = strips[i - t.begin];
          list(RunAt(i, q));
          for (int64_t s = 0; s < run_spans.number; ++s) {
            const Span& span = spans[s];
            stretches[s] = {span.at * strip.count, direct && image_lanes ? span.pixel : span.at * step, span.count};
          }
          WeightRow<T> tile[RowsOf(1)];
          for (int64_t r = 0; r < strip.count; ++r) tile[r] = {strip.to + r, r * pitch};
          MultiplyBlock<true>(strip.count, panel.vectors, {stretches, run_spans.number}, tile, strip.count, from, step,
                              SumsAt(i - t.begin, q - p.begin, sums));
        }
      }
    }
  }

  T* SumsAt(int64_t tile, int64_t panel, T* sums) const { return sums + tile * part_size() + panel * kTile; }

  // The same sums, a product at a time and none of padding.
  void AddOneByOne(Interval t, Interval p, List<Piece> block, const E* image_data, const E* block_source, T* sums) const {
    for (int64_t i = t.begin; i < t.end; ++i) {
      for (int64_t q = p.begin; q < p.end; ++q) {
        const Panel panel = PanelAt(q);
        const Interval rows = RowsAt(i), lanes = LanesAt(panel);
        T* to = SumsAt(i - t.begin, q - p.begin, sums);
        for (int64_t k = 0; k < run_taps; ++k) {
          const Reach reach(problem, RunAt(i, q) * run_taps + k);
          for (const Piece& piece : block) {
            const Span span = reach.At(problem, image, piece);
            for (int64_t w = 0; w < span.count; ++w) {
              const E* g = image_data + span.pixel + w * problem.axis[2].stride * image.channels;
              const E* x = block_source + (span.at + w) * source.channels;
              for (int64_t r = rows.begin; r < rows.end; ++r) {
                for (int64_t l = lanes.begin; l < lanes.end; ++l) {
                  const int64_t column = (image_lanes ? l : r) - k * out;
                  if (column < 0 || column >= out) continue;
                  to[(r - rows.begin) * panel.vectors * kN + l - lanes.begin] +=
                      Load<T, 1>(g + column)[0] * Load<T, 1>(x + (image_lanes ? r : l))[0];
                }
              }
            }
          }
        }
      }
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
      const Interval rows = RowsAt(i), lanes = LanesAt(panel);
      const int64_t pitch = panel.vectors * kN;
      const auto [begin, end] = image_lanes ? lanes : rows;
      for (int64_t column = begin, next; column < end; column = next) {
        const int64_t k = column / out;
        next = Least(end, (k + 1) * out);
        R* to = of_group + (RunAt(i, q) * run_taps + k) * layout.tap + (column - k * out) * layout.out;
        if (image_lanes) {
          Rearrange<T>(rows.end - rows.begin, next - column, sums + column - begin, pitch, 1, to + rows.begin * layout.in, layout.in,
                       layout.out);
        } else {
          Rearrange<T>(next - column, lanes.end - lanes.begin, sums + (column - begin) * pitch, pitch, 1,
                       to + lanes.begin * layout.in, layout.out, layout.in);
        }
      }
    }
  }
};

// Few weights: their operands are read where they lie, as packing them would take as long as the products. [panel][row][lane]
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
      : problem(problem), layout(LayoutOf(problem)), image(image), source(source), out(problem.out / problem.groups),
        rows(Taps(problem) * out), lanes{problem.in / problem.groups} {}

  int64_t units() const { return problem.groups; }
  int64_t parts() const { return lanes.panels(); }
  int64_t part_size() const { return rows * kPitch; }
  int64_t scratch() const {
    return kBlock * sizeof(Piece) + rows * sizeof(Meeting) + problem.axis[2].kernel * sizeof(Interval);
  }

  // The windows of a piece that a row meets inside the image, and the element that the piece's first window would have.
  struct Meeting {
    Interval windows;
    int64_t first, row;
  };

  void Work(int64_t group, Interval windows, T* sums, void* scratch) const {
    Piece* const pieces = static_cast<Piece*>(scratch);
    Meeting* const meetings = reinterpret_cast<Meeting*>(pieces + kBlock);
    Interval* const reached = reinterpret_cast<Interval*>(meetings + rows);
    for (int64_t k = 0; k < problem.axis[2].kernel; ++k) reached[k] = Reached(problem.axis[2], k);
    for (int64_t begin = windows.begin; begin < windows.end; begin += kBlock) {
      const Interval block = {begin, Least(begin + kBlock, windows.end)};
      for (const Piece& piece : List<Piece>{pieces, ListPieces(problem, block, pieces)}) {
        const T* line = source.data + source.row(piece.batch, piece.plane, piece.line) + piece.begin * source.channels;
        const List<Meeting> met = {meetings, ListMeetings(piece, reached, meetings)};
        Add(piece.count, image.data + group * out, line + group * lanes.count, met, sums);
      }
    }
  }

  int64_t ListMeetings(const Piece& piece, const Interval* reached, Meeting* meetings) const {
    const ConvAxis* axis = problem.axis;
    int64_t number = 0, row = 0;
    for (int64_t k0 = 0; k0 < axis[0].kernel; ++k0) {
      const int64_t i = axis[0].stride * piece.plane - axis[0].lo + axis[0].dilation * k0;
      for (int64_t k1 = 0; k1 < axis[1].kernel; ++k1, row += axis[2].kernel * out) {
        const int64_t j = axis[1].stride * piece.line - axis[1].lo + axis[1].dilation * k1;
        if (i < 0 || i >= axis[0].pixels || j < 0 || j >= axis[1].pixels) continue;
        int64_t first = image.row(piece.batch, i, j) + (axis[2].stride * piece.begin - axis[2].lo) * image.channels;
        for (int64_t k2 = 0; k2 < axis[2].kernel; ++k2, first += axis[2].dilation * image.channels) {
          const Interval windows = {Most(0, reached[k2].begin - piece.begin), Least(piece.count, reached[k2].end - piece.begin)};
          if (windows.begin >= windows.end) continue;
          for (int64_t c = 0; c < out; ++c) meetings[number++] = {windows, first + c, row + k2 * out + c};
        }
      }
    }
    return number;
  }

  void Add(int64_t windows, const T* image_data, const T* line, List<Meeting> met, T* sums) const {
    const int64_t row_step = problem.axis[2].stride * image.channels, lane_step = source.channels;
    const int64_t tiles = (met.number + kRows - 1) / kRows, height = tiles > 0 ? (met.number + tiles - 1) / tiles : 0;
    for (const Meeting *first = met.begin(), *last; first != met.end(); first = last) {
      last = first + Least(height, met.end() - first);
      Interval all = {0, windows};  // of all rows
      WeightRow<T> tile[kRows];
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
          MultiplyBlock<false>(n, panel.vectors, {&stretch, 1}, tile + (from - first), row_step, line + panel.start, lane_step,
                               sums + q * part_size());
        };
        multiply(first, last - first, all.begin, all.end);
        // What is inside for some rows alone; neighbours that agree go together.
        for (const Meeting *m = first, *next; m != last; m = next) {
          const Interval mine = m->windows;
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
    for (int64_t tap = 0; tap < Taps(problem); ++tap, sums += out * kPitch) {
      Rearrange<T>(out, panel.vectors * kN, sums, kPitch, 1,
                   result + layout.base + group * layout.group + tap * layout.tap + panel.start * layout.in, layout.out, layout.in);
    }
  }
};

// Groups of few channels: lanes are output channels, of which each meets `depth` copies of the source.
template <class G, class X, class T>
struct AcrossTask {
  const ConvProblem& problem;
  KernelLayout layout;
  Array<const G> image;
  Array<const X> source;  // `depth` copies of `pitch` elements a window; one where they are picked
  int64_t depth, pitch;
  bool picked;
  using Sum = T;

  int64_t units() const { return 1; }
  int64_t parts() const { return Taps(problem) * depth; }
  int64_t part_size() const { return RoundUp(pitch, 16); }
  int64_t scratch() const { return kBlock * sizeof(Piece) + Taps(problem) * sizeof(Reach); }

  void Work(int64_t, Interval windows, T* sums, void* scratch) const {
    Piece* const pieces = static_cast<Piece*>(scratch);
    Reach* const reaches = reinterpret_cast<Reach*>(pieces + kBlock);
    for (int64_t tap = 0; tap < Taps(problem); ++tap) reaches[tap] = Reach(problem, tap);
    for (int64_t begin = windows.begin; begin < windows.end; begin += kBlock) {
      const Interval block = {begin, Least(begin + kBlock, windows.end)};
      for (const Piece& piece : List<Piece>{pieces, ListPieces(problem, block, pieces)}) {
        for (int64_t tap = 0; tap < Taps(problem); ++tap) {
          const Span span = reaches[tap].At(problem, image, piece);
          if (span.count > 0) AddSpan(span, begin + span.at, sums + tap * depth * part_size());
        }
      }
    }
  }

  template <int V>
  void Add(const X* a, int64_t a_step, const G* b, int64_t b_step, int64_t count, T* sums) const {
    constexpr int kN = kLanes<T>;
    Vec<T, kN> sum[V] = {};
    for (int64_t w = 0; w < count; ++w, a += a_step, b += b_step) {
      for (int v = 0; v < V; ++v) sum[v] += Load<T, kN>(a + v * kN) * Load<T, kN>(b + v * kN);
    }
    for (int v = 0; v < V; ++v) StoreRaw<kN>(sums + v * kN, LoadRaw<T, kN>(sums + v * kN) + sum[v]);
  }

  // The sums of D copies from number d on.
  template <int D, int V>
  void AddPicked(const X* a, const G* b, int64_t b_step, int64_t count, int64_t d, T* sums) const {
    constexpr int kN = kLanes<T>;
    const auto table = kPickTables<T>.At(depth) + d;
    Vec<T, kN> sum[D][V] = {};
    for (int64_t w = 0; w < count; ++w, a += source.channels, b += b_step) {
      for (int v = 0; v < V; ++v) {
        const auto x = Load<T, kN>(a + v * kN), g = Load<T, kN>(b + v * kN);
        for (int i = 0; i < D; ++i) sum[i][v] += Pick(x, table[i]) * g;
      }
    }
    for (int i = 0; i < D; ++i) {
      for (int v = 0; v < V; ++v) {
        T* to = sums + (d + i) * part_size() + v * kN;
        StoreRaw<kN>(to, LoadRaw<T, kN>(to) + sum[i][v]);
      }
    }
  }
  template <int D>
  void AddPicked(const Span& span, int64_t window, T* sums) const {
    constexpr int kN = kLanes<T>;
    const X* a = source.data + window * source.channels;
    const G* b = image.data + span.pixel;
    const int64_t lanes = image.channels, step = problem.axis[2].stride * lanes;
    for (int64_t d = 0; d < depth; d += D) {
      int64_t l = 0;
      for (; l + 2 * kN <= lanes; l += 2 * kN) AddPicked<D, 2>(a + l, b + l, step, span.count, d, sums + l);
      if (l < lanes) AddPicked<D, 1>(a + l, b + l, step, span.count, d, sums + l);
    }
  }

  void AddSpan(const Span& span, int64_t window, T* sums) const {
    constexpr int kN = kLanes<T>;
    if constexpr (kPicks) {
      if (picked) return depth == 2 ? AddPicked<2>(span, window, sums) : AddPicked<4>(span, window, sums);
    }
    const int64_t lanes = image.channels, step = problem.axis[2].stride * lanes;
    const G* g = image.data + span.pixel;
    for (int64_t d = 0; d < depth; ++d, sums += part_size()) {
      const X* a = source.data + window * source.channels + d * pitch;
      int64_t l = 0;
      for (; l + 4 * kN <= lanes; l += 4 * kN) Add<4>(a + l, source.channels, g + l, step, span.count, sums + l);
      for (; l + kN <= lanes; l += kN) Add<1>(a + l, source.channels, g + l, step, span.count, sums + l);
      for (; l < lanes; ++l) {
        T sum = 0;
        for (int64_t w = 0; w < span.count; ++w) sum += Load<T, 1>(a + w * source.channels + l)[0] * Load<T, 1>(g + w * step + l)[0];
        sums[l] += sum;
      }
    }
  }

  template <class R>
  void Emit(int64_t, int64_t part, const T* sums, R* result) const {
    const int64_t out = problem.out / problem.groups;
    R* to = result + layout.base + part / depth * layout.tap + part % depth * layout.in;
    for (int64_t l = 0; l < image.channels; ++l) Store<1>(to + l / out * layout.group + l % out * layout.out, Vec<T, 1>{sums[l]});
  }
};

// Runs a task, whose units each add up the products of some weights, in parts, over windows that are given to them.
template <class Task, class R>
bool RunTask(const Task& task, const ConvProblem& problem, int64_t windows, R* result) {
  using T = typename Task::Sum;
  struct Context {
    const Task& task;
    int64_t windows, size, splits;
    T* sums;
    R* result;
  };
  constexpr int64_t kPartials = 4 << 20;  // numbers
  const int64_t units = task.units(), parts = task.parts(), size = parts * task.part_size();
  const int64_t wanted = Least((16 + units - 1) / units, windows / (2 * kBlock));
  const int64_t splits = Most(1, Least(wanted, kPartials / Most(1, units * size)));
  const Buffer sums(splits == 1 ? 0 : splits * units * size * static_cast<int64_t>(sizeof(T)));
  if (sums.data() == nullptr) return false;
  const Context context = {task, windows, size, splits, static_cast<T*>(sums.data()), result};

  const auto add = [](const void* data, int64_t begin, int64_t end) {
    const Context& c = *static_cast<const Context*>(data);
    const int64_t size = c.size, splits = c.splits;
    for (int64_t unit = begin; unit < end; ++unit) {
      T* scratch = static_cast<T*>(Scratch((splits == 1 ? size * sizeof(T) : 0) + c.task.scratch()));
      if (scratch == nullptr) return false;
      T* sums = splits == 1 ? scratch : c.sums + unit * size;
      for (int64_t i = 0; i < size; ++i) sums[i] = 0;
      const int64_t n = unit / splits, split = unit % splits;
      c.task.Work(n, {c.windows * split / splits, c.windows * (split + 1) / splits}, sums, splits == 1 ? scratch + size : scratch);
      for (int64_t part = 0; splits == 1 && part < c.task.parts(); ++part) {
        c.task.Emit(n, part, sums + part * c.task.part_size(), c.result);
      }
    }
    return true;
  };
  const double effort = Effort<T>(problem) / (units * splits);
  if (!ParallelFor(*problem.workers, units * splits, static_cast<int64_t>(effort) + 1, add, &context)) {
    return false;
  }
  if (splits == 1) return true;

  const auto finish = [](const void* data, int64_t begin, int64_t end) {
    const Context& c = *static_cast<const Context*>(data);
    const int64_t parts = c.task.parts(), count = c.task.part_size();
    for (int64_t i = begin; i < end; ++i) {
      const T* const sums = c.sums + i / parts * c.splits * c.size + i % parts * count;
      T* const total = static_cast<T*>(Scratch(count * sizeof(T)));
      if (total == nullptr) return false;
      Sweep<kLanes<T>>(count, [&](auto lanes, auto vectors, int64_t at) {
        constexpr int kN = decltype(lanes)::value;
        for (int v = 0; v < decltype(vectors)::value; ++v, at += kN) {
          auto sum = LoadRaw<T, kN>(sums + at);
          for (int64_t s = 1; s < c.splits; ++s) sum += LoadRaw<T, kN>(sums + at + s * c.size);
          StoreRaw<kN>(total + at, sum);
        }
      });
      c.task.Emit(i / parts, i % parts, total, c.result);
    }
    return true;
  };
  return ParallelFor(*problem.workers, units * parts, task.part_size() * sizeof(T) * splits, finish, &context);
}

// A whole array as a tile.
template <class E, class T>
bool StageAll(const ConvProblem& problem, const Array<const E>& from, int64_t pitch, int64_t depth, int64_t narrow, T* to) {
  struct Context {
    const ConvProblem& problem;
    const Array<const E>& from;
    int64_t pitch, depth, narrow;
    T* to;
  };
  const Context context = {problem, from, pitch, depth, narrow, to};
  const int64_t units = problem.batch * from.size[0] * from.size[1];
  const auto body = [](const void* data, int64_t begin, int64_t end) {
    const Context& c = *static_cast<const Context*>(data);
    const int64_t lines = c.from.size[1], planes = c.from.size[0];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t j = unit % lines, i = unit / lines % planes, b = unit / lines / planes;
      Stage<E>(c.from, {{{b, b + 1}, {i, i + 1}, {j, j + 1}, {0, c.from.size[2]}}}, c.to + unit * c.from.size[2] * c.pitch,
               c.pitch, c.depth, c.narrow);
    }
    return true;
  };
  return units == 0 || ParallelFor(*problem.workers, units, from.size[2] * pitch * sizeof(T), body, &context);
}

template <class G, class X, class R>
bool WeightGradientOf(const ConvProblem& problem, const Array<const G>& image, const Array<const X>& source, bool across,
                      int64_t pitch) {
  using T = Acc<G>;
  const int64_t in = problem.in / problem.groups, out = problem.out / problem.groups, taps = Taps(problem);
  const int64_t windows = problem.batch * source.pixels();
  R* const result = static_cast<R*>(problem.result);
  const auto run = [&](const auto& task) { return RunTask(task, problem, windows, result); };
  if (across) return run(AcrossTask<G, X, T>{problem, LayoutOf(problem), image, source, in, pitch, Picks<T>(in, out, problem.out)});
  if constexpr (std::is_same_v<G, X>) {
    // Measured: with as many rows as there are windows in a line, what a line costs at its ends outweighs the packing.
    if constexpr (std::is_same_v<G, T>) {
      if (in >= kLanes<T> && taps * out <= Least(problem.axis[2].windows, 128)) {
        return run(DirectTask<T>(problem, image, source));
      }
    }
    const int64_t row_of_kernel = problem.groups == 1 && problem.axis[2].dilation == 1 ? problem.axis[2].kernel : 1;
    const WeightTask<G, T> ways[] = {{problem, image, source, true, 1}, {problem, image, source, false, 1},
                                     {problem, image, source, true, row_of_kernel}, {problem, image, source, false, row_of_kernel}};
    const WeightTask<G, T>* best = ways;
    for (const auto& way : ways) {
      if (way.Cost(windows) < best->Cost(windows)) best = &way;
    }
    return run(*best);
  }
  __builtin_unreachable();
}

// Operands that are channels last are read where they are; others are copied first.
template <class E, class R>
bool WeightGradient(const ConvProblem& problem) {
  using T = Acc<E>;
  const int64_t in = problem.in / problem.groups, out = problem.out / problem.groups;
  const Array<const E> image = Image<const E>(problem, const_cast<void*>(problem.operand[0]));
  const Array<const E> source = Windows<const E>(problem, const_cast<void*>(problem.operand[1]));
  const bool across = problem.groups > 1 && 2 * out <= kLanes<T> && in <= kLanes<T>;
  const bool expand = across && (in != 1 || out != 1) && !Picks<T>(in, out, problem.out);
  const int64_t copies = expand ? in : 1, pitch = expand ? problem.out : problem.in;
  if (problem.channels_last && !expand) return WeightGradientOf<E, E, R>(problem, image, source, across, pitch);

  const auto pixels = [&](const Array<const E>& array) { return problem.batch * array.pixels() * int64_t{sizeof(T)}; };
  const Buffer image_copy(problem.channels_last ? 0 : pixels(image) * image.channels);
  const Buffer source_copy(pixels(source) * copies * pitch);
  if (image_copy.data() == nullptr || source_copy.data() == nullptr) return false;
  const auto copied = [](const Array<const E>& array, const Buffer& copy, int64_t channels) {
    return Array<const T>{static_cast<const T*>(copy.data()), {array.size[0], array.size[1], array.size[2]}, channels, true};
  };
  const Array<const T> x = copied(source, source_copy, copies * pitch);
  if (!StageAll<E>(problem, source, copies * pitch, copies, expand ? out : 1, static_cast<T*>(source_copy.data()))) return false;
  if (problem.channels_last) return WeightGradientOf<E, T, R>(problem, image, x, across, pitch);
  if (!StageAll<E>(problem, image, image.channels, 1, 1, static_cast<T*>(image_copy.data()))) return false;
  return WeightGradientOf<T, T, R>(problem, copied(image, image_copy, image.channels), x, across, pitch);
}
