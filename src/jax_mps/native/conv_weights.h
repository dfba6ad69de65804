// The weight gradient: dW[tap, out, in] = sum over windows of image[pixel(window, tap), out] * source[window, in].
//
// Windows are worked on in blocks. Of each block one side becomes tiles of kRows columns, the other panels of vectors, both
// packed window by window. Many windows and few weights are split among tasks, whose partial sums are added in a fixed order.

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

struct Pieces {
  const Piece* first;
  int64_t number;
  const Piece* begin() const { return first; }
  const Piece* end() const { return first + number; }
};

// Copies `count` numbers. Where they are converted, at least four are read.
template <class E, class T>
constexpr int Readable(int count) {
  return std::is_same_v<E, T> || count > 4 ? count : 4;
}
template <int count, class E, class T>
inline void CopyNumbers(const E* from, T* to) {
  constexpr int kN = count < kLanes<T> ? 4 : kLanes<T>;
  if constexpr (std::is_same_v<E, T>) {
    __builtin_memcpy(to, from, count * sizeof(T));
  } else if constexpr (count < kN) {
    const auto numbers = Load<T, kN>(from);
    __builtin_memcpy(to, &numbers, count * sizeof(T));
  } else {
    for (int i = 0; i < count; i += kN) {
      const int at = i + kN > count ? count - kN : i;
      StoreRaw<kN>(to + at, Load<T, kN>(from + at));
    }
  }
}

// One operand as columns: channels of the source, or of the pixels that a window touches through a run of taps.
template <class E, class T>
struct Columns {
  const ConvProblem& problem;
  Array<const E> array;
  bool image;
  int64_t runs, width;  // columns: runs * width
  int64_t run_taps;     // adjacent taps in a run
  int64_t group;        // first channel

  // The first pixel a run touches, for the window at the origin.
  struct Origin {
    int64_t plane, line, pixel;
  };
  Origin OriginOf(int64_t run) const {
    const ConvAxis* axis = problem.axis;
    const int64_t runs_of_row = axis[2].kernel / run_taps;
    return {axis[0].dilation * (run / runs_of_row / axis[1].kernel) - axis[0].lo,
            axis[1].dilation * (run / runs_of_row % axis[1].kernel) - axis[1].lo,
            axis[2].dilation * (run % runs_of_row) - axis[2].lo};
  }

  // The row that a run reads for a piece: elements first + step * window + column, where inside [0, limit).
  struct Line {
    const E* data;
    int64_t first, step, limit;
  };
  Line At(const Piece& piece, const Origin& origin) const {
    if (!image) {
      return {array.data + array.row(piece.batch, piece.plane, piece.line), piece.begin * array.channels + group,
              array.channels, array.size[2] * array.channels};
    }
    const ConvAxis* axis = problem.axis;
    const int64_t i = axis[0].stride * piece.plane + origin.plane, j = axis[1].stride * piece.line + origin.line;
    if (i < 0 || i >= axis[0].pixels || j < 0 || j >= axis[1].pixels) return {array.data, 0, 0, 0};
    return {array.data + array.row(piece.batch, i, j), (axis[2].stride * piece.begin + origin.pixel) * array.channels + group,
            axis[2].stride * array.channels, array.size[2] * array.channels};
  }

  // Columns [column, column + count) of a run for all windows of a block, `pitch` apart; zeros outside the image.
  template <int count>
  void PackExactly(Pieces pieces, int64_t run, int64_t column, int64_t pitch, T* to) const {
    constexpr int kRead = Readable<E, T>(count);
    const Origin origin = OriginOf(run);
    for (const Piece& piece : pieces) {
      const Line line = At(piece, origin);
      const int64_t first = line.first + column, step = line.step, last = first + (piece.count - 1) * step + kRead;
      T* out = to + piece.at * pitch;
      int64_t begin = 0, end = piece.count;  // windows all of whose columns are inside
      if (line.limit == 0) {
        end = 0;
      } else if (first < 0 || last > line.limit) {
        begin = first >= 0 ? 0 : Least(piece.count, (step - 1 - first) / step);
        end = first + kRead > line.limit ? begin : Most(begin, Least(piece.count, (line.limit - kRead - first) / step + 1));
      }
      for (int64_t w = 0; w < piece.count; ++w) {
        if (w == begin) w = end;
        if (w == piece.count) break;
        for (int64_t c = 0; c < count; ++c) {
          const int64_t at = first + w * step + c;
          out[w * pitch + c] = at >= 0 && at < line.limit ? Load<T, 1>(line.data + at)[0] : 0;
        }
      }
      const E* from = line.data + first;
      for (int64_t w = begin; w < end; ++w) CopyNumbers<count>(from + w * step, out + w * pitch);
    }
  }
  template <int most>
  void Pack(Pieces pieces, int64_t run, int64_t column, int64_t count, int64_t pitch, T* to) const {
    if constexpr (most > 1) {
      if (count < most) return Pack<most - 1>(pieces, run, column, count, pitch, to);
    }
    PackExactly<most>(pieces, run, column, pitch, to);
  }
};

// A row of weights: where it reads and where its sums are.
template <class T>
struct WeightRow {
  const T* from;
  T* to;
};

// to[r][v] += from[r][window] * panel[window][v], over the windows. If `packed`, rows and panel are adjacent window by window.
template <bool packed, int R, int V, class T>
__attribute__((noinline, flatten)) void MultiplyBlock(int64_t windows, const WeightRow<T>* rows, int64_t row_step,
                                                      const T* panel, int64_t panel_step) {
  constexpr int kN = kLanes<T>;
  if constexpr (packed) row_step = R, panel_step = V * kN;  // the same, as constants
  Vec<T, kN> sum[R][V];
  const T* from[R];
  Unroll<R>([&](int r) {
    from[r] = rows[r].from;
    Unroll<V>([&](int v) { sum[r][v] = Vec<T, kN>{}; });
  });
  const int64_t end = windows * row_step;
  for (int64_t i = 0; i < end; i += row_step, panel += panel_step) {
    Vec<T, kN> vector[V];
    Unroll<V>([&](int v) { vector[v] = LoadRaw<T, kN>(panel + v * kN); });
    Unroll<R>([&](int r) {
      const auto element = Broadcast<T, kN>(packed ? from[0][i + r] : from[r][i]);
      Unroll<V>([&](int v) { sum[r][v] += element * vector[v]; });
    });
  }
  Unroll<R * V>([&](int i) {
    T* to = rows[i / V].to + i % V * kN;
    StoreRaw<kN>(to, LoadRaw<T, kN>(to) + sum[i / V][i % V]);
  });
}

template <bool packed, int R = kRows, int V = kPanel, class T>
inline void MultiplyBlock(int64_t height, int64_t vectors, int64_t windows, const WeightRow<T>* rows, int64_t row_step,
                          const T* panel, int64_t panel_step) {
  if constexpr (V > 1) {
    if (vectors < V) return MultiplyBlock<packed, R, V - 1>(height, vectors, windows, rows, row_step, panel, panel_step);
  }
  if constexpr (R > 1) {
    if (height < R) return MultiplyBlock<packed, R - 1, V>(height, vectors, windows, rows, row_step, panel, panel_step);
  }
  MultiplyBlock<packed, R, V>(windows, rows, row_step, panel, panel_step);
}

// The shared part: where partial sums go, and how they become the result.
template <class T>
struct Partial {
  T* sums;
  int64_t size, splits;  // weights; partial sums of each
};

template <class R, class T>
bool Finish(const Schedule& schedule, const Partial<T>& partial, R* result) {
  constexpr int64_t kPart = 4096;
  struct Context {
    const Partial<T>& partial;
    R* result;
  };
  const Context context = {partial, result};
  const auto body = [](const void* data, int64_t begin, int64_t end) {
    const Context& c = *static_cast<const Context*>(data);
    const int64_t first = begin * kPart, last = Least(end * kPart, c.partial.size);
    Sweep<kLanes<T>>(last - first, [&](auto lanes, auto vectors, int64_t i) {
      constexpr int kN = decltype(lanes)::value;
      for (int v = 0; v < decltype(vectors)::value; ++v, i += kN) {
        const T* from = c.partial.sums + first + i;
        auto sum = LoadRaw<T, kN>(from);
        for (int64_t s = 1; s < c.partial.splits; ++s) sum += LoadRaw<T, kN>(from + s * c.partial.size);
        Store<kN>(c.result + first + i, sum);
      }
    });
    return true;
  };
  return ParallelFor(schedule, (partial.size + kPart - 1) / kPart, kPart * sizeof(T) * partial.splits, body, &context);
}

template <class E, class T>
struct WeightTask {
  const ConvProblem& problem;
  KernelLayout layout;
  Columns<E, T> row_side, lane_side;  // of group 0
  Partial<T> partial;
  int64_t windows;
  int64_t tiles_of_run, tiles, row_blocks, panels, lane_blocks;

  Lanes<T> lanes() const { return {lane_side.width}; }
  static constexpr int64_t kTile = kRows * kPanel * kLanes<T>;

  int64_t units() const { return problem.groups * row_blocks * lane_blocks * partial.splits; }
  int64_t tiles_of_block() const { return (tiles + row_blocks - 1) / row_blocks; }
  int64_t panels_of_block() const { return (panels + lane_blocks - 1) / lane_blocks; }

  // Columns of tile t.
  Interval Height(int64_t t) const {
    const int64_t i = t % tiles_of_run;
    return {row_side.width * i / tiles_of_run, row_side.width * (i + 1) / tiles_of_run};
  }
  Panel PanelAt(int64_t q) const { return lanes().panel(q % lanes().panels()); }

  // Where a weight lies but for its group.
  int64_t Entry(const Columns<E, T>& side, int64_t run, int64_t column) const {
    if (!side.image) return column * layout.in;
    const int64_t out = problem.out / problem.groups;
    return (run * side.run_taps + column / out) * layout.tap + column % out * layout.out;
  }

  bool Padded(Pieces pieces) const {
    bool padded = false;
    for (const Piece& piece : pieces) {
      const int64_t first[3] = {piece.plane, piece.line, piece.begin};
      const int64_t last[3] = {piece.plane, piece.line, piece.begin + piece.count - 1};
      for (int a = 0; a < 3; ++a) {
        const ConvAxis& axis = problem.axis[a];
        padded |= axis.stride * first[a] < axis.lo ||
                  axis.stride * last[a] - axis.lo + axis.dilation * (axis.kernel - 1) >= axis.pixels;
      }
    }
    return padded;
  }

  static bool Finite(T value) { return value - value == 0; }

  // Zeros for what is not finite; false if there was nothing.
  static bool Clean(T* numbers, int64_t count) {
    constexpr int kN = kLanes<T>;
    Vec<T, kN> sum[4] = {};
    Sweep<kN>(count, [&](auto lanes, auto vectors, int64_t i) {
      constexpr int kSome = decltype(lanes)::value;
      for (int v = 0; v < decltype(vectors)::value; ++v) {
        const auto number = LoadRaw<T, kSome>(numbers + i + v * kSome);
        if constexpr (kSome == kN) {
          sum[v] += number - number;
        } else {
          for (int lane = 0; lane < kSome; ++lane) sum[0][lane] += number[lane] - number[lane];
        }
      }
    });
    bool found = false;
    for (int lane = 0; lane < kN; ++lane) found |= !(sum[0][lane] + sum[1][lane] + sum[2][lane] + sum[3][lane] == 0);
    for (int64_t i = 0; found && i < count; ++i) {
      if (!Finite(numbers[i])) numbers[i] = 0;
    }
    return found;
  }

  // Adds the products of what Clean took away.
  void Repair(Pieces pieces, const Columns<E, T>& rows, const Columns<E, T>& columns, int64_t tile, int64_t panel, T* sums) const {
    const Interval height = Height(tile);
    const auto [start, vectors, before] = PanelAt(panel);
    const int64_t width = vectors * kLanes<T>, first = start;
    for (const Piece& piece : pieces) {
      const auto row_line = rows.At(piece, rows.OriginOf(tile / tiles_of_run));
      const auto lane_line = columns.At(piece, columns.OriginOf(panel / lanes().panels()));
      const auto get = [](const auto& line, int64_t w, int64_t column, T& value) {
        const int64_t at = line.first + w * line.step + column;
        if (at < 0 || at >= line.limit) return false;
        value = Load<T, 1>(line.data + at)[0];
        return true;
      };
      for (int64_t w = 0; w < piece.count; ++w) {
        for (int64_t r = height.begin; r < height.end; ++r) {
          T a, b;
          if (!get(row_line, w, r, a)) continue;
          for (int64_t lane = 0; lane < width && first + lane < lane_side.width; ++lane) {
            if (!get(lane_line, w, first + lane, b) || (Finite(a) && Finite(b))) continue;
            sums[(r - height.begin) * width + lane] += a * b;
          }
        }
      }
    }
  }

  bool Work(int64_t unit) const {
    constexpr int kN = kLanes<T>;
    const int64_t split = unit % partial.splits;
    unit /= partial.splits;
    const int64_t lane_block = unit % lane_blocks, row_block = unit / lane_blocks % row_blocks;
    const int64_t group = unit / lane_blocks / row_blocks;
    const Interval t = {tiles * row_block / row_blocks, tiles * (row_block + 1) / row_blocks};
    const Interval p = {panels * lane_block / lane_blocks, panels * (lane_block + 1) / lane_blocks};
    Columns<E, T> rows = row_side, columns = lane_side;
    rows.group = group * (rows.image ? problem.out : problem.in) / problem.groups;
    columns.group = group * (columns.image ? problem.out : problem.in) / problem.groups;

    const int64_t sum_room = tiles_of_block() * panels_of_block() * kTile, row_room = tiles_of_block() * kRows * kBlock;
    const int64_t numbers = sum_room + row_room + kBlock * kPanel * kN;
    T* sums = static_cast<T*>(Scratch(numbers * sizeof(T) + kBlock * sizeof(Piece)));
    if (sums == nullptr) return false;
    Piece* list = reinterpret_cast<Piece*>(sums + numbers);
    T* packed_rows = sums + sum_room;
    T* packed_panel = packed_rows + row_room;
    for (int64_t i = 0; i < sum_room; ++i) sums[i] = 0;

    const int64_t end = windows * (split + 1) / partial.splits;
    for (int64_t begin = windows * split / partial.splits; begin < end; begin += kBlock) {
      const Interval block = {begin, Least(begin + kBlock, end)};
      const int64_t count = block.end - block.begin;
      const Pieces pieces = {list, ListPieces(problem, block, list)};
      const bool padded = Padded(pieces);
      // Padding is packed as zeros, which must not meet a source that is not finite. Where a block has both, whatever is not
      // finite in it is multiplied by itself.
      bool repair = false;
      for (int64_t i = t.begin; i < t.end; ++i) {
        const Interval height = Height(i);
        T* to = packed_rows + (i - t.begin) * kRows * kBlock;
        const int64_t h = height.end - height.begin;
        rows.template Pack<kRows>(pieces, i / tiles_of_run, height.begin, h, h, to);
        if (padded && !rows.image) repair |= Clean(to, h * count);
      }
      for (int64_t q = p.begin; q < p.end; ++q) {
        const Panel panel = PanelAt(q);
        const int64_t pitch = panel.vectors * kN, width = Least(pitch, lane_side.width);
        for (int64_t w = 0; width < pitch && w < count; ++w) {
          for (int64_t lane = width; lane < pitch; ++lane) packed_panel[w * pitch + lane] = 0;
        }
        if (panel.vectors == kPanel) {
          columns.template PackExactly<kPanel * kN>(pieces, q / lanes().panels(), panel.start, pitch, packed_panel);
        }
        for (int64_t lane = 0; panel.vectors < kPanel && lane < width; lane += kN) {
          columns.template Pack<kN>(pieces, q / lanes().panels(), panel.start + lane, Least(kN, width), pitch, packed_panel + lane);
        }
        if (padded && (repair || rows.image) && Clean(packed_panel, count * pitch) && !repair) {
          repair = true;
          for (int64_t i = t.begin; i < t.end; ++i) {
            const Interval height = Height(i);
            Clean(packed_rows + (i - t.begin) * kRows * kBlock, (height.end - height.begin) * count);
          }
        }
        for (int64_t i = t.begin; i < t.end; ++i) {
          const Interval height = Height(i);
          T* to = sums + ((i - t.begin) * panels_of_block() + q - p.begin) * kTile;
          const int64_t h = height.end - height.begin;
          WeightRow<T> tile[kRows];
          for (int64_t r = 0; r < h; ++r) tile[r] = {packed_rows + (i - t.begin) * kRows * kBlock + r, to + r * pitch};
          MultiplyBlock<true>(h, panel.vectors, count, tile, h, packed_panel, pitch);
          if (repair) Repair(pieces, rows, columns, i, q, to);
        }
      }
    }

    T* to = partial.sums + split * partial.size + layout.base + group * layout.group;
    for (int64_t i = t.begin; i < t.end; ++i) {
      const Interval height = Height(i);
      for (int64_t q = p.begin; q < p.end; ++q) {
        const Panel panel = PanelAt(q);
        const T* tile = sums + ((i - t.begin) * panels_of_block() + q - p.begin) * kTile;
        for (int64_t r = height.begin; r < height.end; ++r) {
          T* row = to + Entry(rows, i / tiles_of_run, r);
          for (int64_t lane = 0; lane < panel.vectors * kN && panel.start + lane < lane_side.width; ++lane) {
            row[Entry(columns, q / lanes().panels(), panel.start + lane)] = tile[lane];
          }
          tile += panel.vectors * kN;
        }
      }
    }
    return true;
  }
};

// Few weights: their operands are read where they lie, as packing them would take as long as the products.
template <class T>
struct DirectTask {
  const ConvProblem& problem;
  KernelLayout layout;
  Columns<T, T> row_side, lane_side;  // the image and the source, of group 0
  Partial<T> partial;
  int64_t windows;

  int64_t rows() const { return row_side.runs * row_side.width; }
  int64_t units() const { return problem.groups * partial.splits; }

  // The windows of a piece for which an element of a line is inside the image.
  static Interval Inside(const typename Columns<T, T>::Line& line, int64_t first, int64_t count) {
    if (first >= line.limit) return {0, 0};
    const int64_t begin = first >= 0 ? 0 : (line.step - 1 - first) / line.step;
    const bool whole = first + (count - 1) * line.step < line.limit;
    return {begin, whole ? count : (line.limit - 1 - first) / line.step + 1};
  }

  // Sums of a piece, one row after the other in each panel.
  void Add(const Piece& piece, const Columns<T, T>& image, const Columns<T, T>& source, T* sums) const {
    constexpr int kN = kLanes<T>;
    const Lanes<T> lanes = {source.width};
    const auto line = source.At(piece, {});
    const int64_t height = rows(), tiles = (height + kRows - 1) / kRows, most = (height + tiles - 1) / tiles;
    auto row = image.At(piece, image.OriginOf(0));
    for (int64_t r = 0, run = 0, column = 0; r < height;) {
      WeightRow<T> tile[kRows];
      Interval inside[kRows], all = {0, piece.count};  // windows of a row; of all rows
      int64_t number[kRows], count = 0;
      for (const int64_t end = Least(r + most, height); r < end; ++r, ++column) {
        if (column == image.width) {
          column = 0;
          row = image.At(piece, image.OriginOf(++run));
        }
        const Interval windows = Inside(row, row.first + column, piece.count);
        if (windows.begin >= windows.end) continue;
        tile[count].from = row.data + row.first + column;
        inside[count] = windows;
        number[count++] = r;
        all = {Most(all.begin, windows.begin), Least(all.end, windows.end)};
      }
      if (count == 0) continue;
      if (all.begin >= all.end) all = {0, 0};
      const int64_t step = problem.axis[2].stride * image.array.channels;
      for (int64_t q = 0; q < lanes.panels(); ++q) {
        const Panel panel = lanes.panel(q);
        const auto multiply = [&](int64_t i, int64_t n, int64_t begin, int64_t end) {
          if (begin >= end) return;
          WeightRow<T> some[kRows];
          for (int64_t j = 0; j < n; ++j) {
            T* to = sums + (panel.first * height + number[i + j] * panel.vectors) * kN;
            some[j] = {tile[i + j].from + begin * step, to};
          }
          const T* from = line.data + line.first + begin * line.step + panel.start;
          MultiplyBlock<false>(n, panel.vectors, end - begin, some, step, from, line.step);
        };
        multiply(0, count, all.begin, all.end);
        // What is inside for some rows alone; neighbours that agree go together.
        for (int64_t i = 0, n; i < count; i += n) {
          const Interval mine = inside[i];
          for (n = 1; i + n < count && inside[i + n].begin == mine.begin && inside[i + n].end == mine.end;) ++n;
          multiply(i, n, mine.begin, all.end > 0 ? all.begin : mine.end);
          if (all.end > 0) multiply(i, n, all.end, mine.end);
        }
      }
    }
  }

  bool Work(int64_t unit) const {
    constexpr int kN = kLanes<T>;
    const int64_t split = unit % partial.splits, group = unit / partial.splits, height = rows();
    Columns<T, T> image = row_side, source = lane_side;
    image.group = group * problem.out / problem.groups;
    source.group = group * problem.in / problem.groups;
    const Lanes<T> lanes = {source.width};
    const int64_t numbers = height * lanes.vectors() * kN;
    T* sums = static_cast<T*>(Scratch(numbers * sizeof(T) + kBlock * sizeof(Piece)));
    if (sums == nullptr) return false;
    Piece* list = reinterpret_cast<Piece*>(sums + numbers);
    for (int64_t i = 0; i < numbers; ++i) sums[i] = 0;
    const int64_t end = windows * (split + 1) / partial.splits;
    for (int64_t begin = windows * split / partial.splits; begin < end; begin += kBlock) {
      const int64_t pieces = ListPieces(problem, {begin, Least(begin + kBlock, end)}, list);
      for (const Piece& piece : Pieces{list, pieces}) Add(piece, image, source, sums);
    }
    T* to = partial.sums + split * partial.size + layout.base + group * layout.group;
    for (int64_t q = 0; q < lanes.panels(); ++q) {
      const Panel panel = lanes.panel(q);
      const T* from = sums + panel.first * height * kN;
      for (int64_t r = 0; r < height; ++r, from += panel.vectors * kN) {
        const int64_t out = problem.out / problem.groups, tap = r / image.width * image.run_taps + r % image.width / out;
        T* row = to + tap * layout.tap + r % image.width % out * layout.out;
        for (int64_t lane = 0; lane < panel.vectors * kN; ++lane) row[(panel.start + lane) * layout.in] = from[lane];
      }
    }
    return true;
  }
};

// Groups of few channels: lanes are output channels, of which each meets `depth` copies of the source.
template <class G, class X, class T>
struct AcrossTask {
  const ConvProblem& problem;
  KernelLayout layout;
  Array<const G> image;
  Array<const X> source;  // the source has depth * pitch elements a window
  int64_t depth, pitch;
  Partial<T> partial;
  int64_t windows;

  int64_t units() const { return partial.splits; }

  template <int V>
  void Sum(const X* a, int64_t a_step, const G* b, int64_t b_step, int64_t count, T* sums) const {
    constexpr int kN = kLanes<T>;
    Vec<T, kN> sum[V] = {};
    for (int64_t w = 0; w < count; ++w, a += a_step, b += b_step) {
      for (int v = 0; v < V; ++v) sum[v] += Load<T, kN>(a + v * kN) * Load<T, kN>(b + v * kN);
    }
    for (int v = 0; v < V; ++v) StoreRaw<kN>(sums + v * kN, LoadRaw<T, kN>(sums + v * kN) + sum[v]);
  }

  bool Work(int64_t split) const {
    constexpr int kN = kLanes<T>;
    const ConvAxis* axis = problem.axis;
    const int64_t lanes = image.channels;
    const int64_t size = Taps(problem) * depth * pitch;
    const Interval mine = {windows * split / partial.splits, windows * (split + 1) / partial.splits};
    T* sums = static_cast<T*>(Scratch(RoundUp(size, 16) * sizeof(T) + (mine.end - mine.begin) * sizeof(Piece)));
    if (sums == nullptr) return false;
    for (int64_t i = 0; i < size; ++i) sums[i] = 0;
    Piece* list = reinterpret_cast<Piece*>(sums + RoundUp(size, 16));
    for (const Piece& piece : Pieces{list, ListPieces(problem, mine, list)}) {
      const X* x = source.data + source.row(piece.batch, piece.plane, piece.line);
      for (int64_t tap = 0; tap < Taps(problem); ++tap) {
        const int64_t k = tap % axis[2].kernel, rest = tap / axis[2].kernel;
        const int64_t i = axis[0].stride * piece.plane - axis[0].lo + axis[0].dilation * (rest / axis[1].kernel);
        const int64_t j = axis[1].stride * piece.line - axis[1].lo + axis[1].dilation * (rest % axis[1].kernel);
        if (i < 0 || i >= axis[0].pixels || j < 0 || j >= axis[1].pixels) continue;
        const int64_t first = axis[2].dilation * k - axis[2].lo;
        const int64_t begin = Most(piece.begin, first >= 0 ? 0 : (axis[2].stride - 1 - first) / axis[2].stride);
        const int64_t end = axis[2].pixels <= first ? 0 : Least(piece.begin + piece.count, (axis[2].pixels - 1 - first) / axis[2].stride + 1);
        if (begin >= end) continue;
        const G* g = image.data + image.row(piece.batch, i, j) + (axis[2].stride * begin + first) * image.channels;
        for (int64_t d = 0; d < depth; ++d) {
          const X* a = x + begin * source.channels + d * pitch;
          T* to = sums + (tap * depth + d) * pitch;
          const int64_t step = axis[2].stride * image.channels;
          int64_t l = 0;
          for (; l + 4 * kN <= lanes; l += 4 * kN) Sum<4>(a + l, source.channels, g + l, step, end - begin, to + l);
          for (; l + kN <= lanes; l += kN) Sum<1>(a + l, source.channels, g + l, step, end - begin, to + l);
          for (; l < lanes; ++l) {
            T sum = 0;
            for (int64_t w = 0; w < end - begin; ++w) sum += Load<T, 1>(a + w * source.channels + l)[0] * Load<T, 1>(g + w * step + l)[0];
            to[l] += sum;
          }
        }
      }
    }
    const int64_t out = problem.out / problem.groups;
    for (int64_t tap = 0; tap < Taps(problem); ++tap) {
      for (int64_t d = 0; d < depth; ++d) {
        T* to = partial.sums + split * partial.size + layout.base + tap * layout.tap + d * layout.in;
        const T* from = sums + (tap * depth + d) * pitch;
        for (int64_t l = 0; l < lanes; ++l) to[l / out * layout.group + l % out * layout.out] = from[l];
      }
    }
    return true;
  }
};

template <class Task>
bool RunTasks(const Task& task, const Schedule& schedule, double work) {
  const auto body = [](const void* data, int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      if (!static_cast<const Task*>(data)->Work(unit)) return false;
    }
    return true;
  };
  return ParallelFor(schedule, task.units(), static_cast<int64_t>(work / 4 / task.units()) + 1024, body, &task);
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
  return units == 0 || ParallelFor(*problem.schedule, units, from.size[2] * pitch * sizeof(T), body, &context);
}

template <class G, class X, class R>
bool WeightGradientOf(const ConvProblem& problem, const Array<const G>& image, const Array<const X>& source, bool across,
                      int64_t pitch) {
  using T = Acc<G>;
  const int64_t in = problem.in / problem.groups, out = problem.out / problem.groups, taps = Taps(problem);
  const int64_t windows = problem.batch * source.pixels(), size = taps * in * problem.out;
  const double work = 2.0 * windows * taps * in * problem.out;
  constexpr int64_t kPartials = 4 << 20;  // elements
  const auto split = [&](int64_t others) {
    const int64_t wanted = Least((16 + others - 1) / others, windows / (2 * kBlock));
    return Most(1, Least(wanted, kPartials / Most(1, size)));
  };
  const KernelLayout layout = LayoutOf(problem);
  const auto finish = [&](auto task) {
    const bool at_once = task.partial.splits == 1 && std::is_same_v<R, T>;
    const Buffer sums(at_once ? 0 : task.partial.splits * size * static_cast<int64_t>(sizeof(T)));
    if (sums.data() == nullptr) return false;
    task.partial.sums = static_cast<T*>(at_once ? problem.result : sums.data());
    if (!RunTasks(task, *problem.schedule, work)) return false;
    return at_once || Finish(*problem.schedule, task.partial, static_cast<R*>(problem.result));
  };
  if (across) {
    return finish(AcrossTask<G, X, T>{problem, layout, image, source, in, pitch, {nullptr, size, split(1)}, windows});
  }
  if constexpr (std::is_same_v<G, X>) {
    const bool joined = problem.groups == 1 && problem.axis[2].dilation == 1;
    const int64_t run_taps = joined ? problem.axis[2].kernel : 1;
    const Columns<G, T> image_side = {problem, image, true, taps / run_taps, run_taps * out, run_taps, 0};
    const Columns<G, T> source_side = {problem, source, false, 1, in, 1, 0};
    // Measured: with as many rows as there are windows in a line, what a line costs at its ends outweighs the packing.
    if constexpr (std::is_same_v<G, T>) {
      if (in >= kLanes<T> && taps * out <= Least(problem.axis[2].windows, 128)) {
        return finish(DirectTask<T>{problem, layout, image_side, source_side, {nullptr, size, split(problem.groups)}, windows});
      }
    }
    const bool swap = in < kLanes<T> && image_side.width > in;
    WeightTask<G, T> task = {problem, layout, swap ? source_side : image_side, swap ? image_side : source_side,
                             {nullptr, size, 1}, windows, 0, 0, 0, 0, 0};
    task.tiles_of_run = (task.row_side.width + kRows - 1) / kRows;
    task.tiles = task.row_side.runs * task.tiles_of_run;
    task.panels = task.lane_side.runs * task.lanes().panels();
    task.lane_blocks = (task.panels + 15) / 16;
    task.row_blocks = (task.tiles + 23) / 24;
    if (task.row_blocks > 4) task.row_blocks = RoundUp(task.row_blocks, 4);  // shares of equal size
    task.partial.splits = split(problem.groups * task.row_blocks * task.lane_blocks);
    return finish(task);
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
  const bool expand = across && (in != 1 || out != 1);
  const int64_t copies = across ? in : 1, pitch = across ? problem.out : problem.in;
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
