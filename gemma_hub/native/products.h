// Products of few rows with a row-major matrix, at the speed at which memory is read.
//
// y (rows, out) = x (rows, in) times weight (out, in) transposed. The sums are in float32, and are
// the same bit by bit for any number of rows and threads: each is of the same terms in the same
// order. Types are float32 and bfloat16; x, weight and y have the same, or y has float32.

#pragma once

#include <memory>

#include "vectors.h"

namespace gemma_hub {

constexpr int GROUP = 8;   // rows of x that share one read of the weight
constexpr int AHEAD = 64;  // elements

template <class T, class Y = T>
class Product {
 public:
  // `stride` is from a row of the weight to the next; 0: they follow one another.
  Product(const T* weight, const T* x, Y* y, int64_t rows, int64_t in, int64_t out,
          int64_t stride = 0)
      : weight_(weight), y_(y), rows_(rows), in_(in), out_(out), stride_(stride ? stride : in),
        whole_(in / STEP * STEP) {
    padded_ = whole_ == in ? in : whole_ + STEP;
    // What a vector is loaded from without crossing a line of the cache.
    memory_.reset(new float[rows * padded_ + BYTES / 4]);
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory_.get());
    x_ = reinterpret_cast<float*>((start + BYTES - 1) / BYTES * BYTES);
    for (int64_t first = 0; first < rows; first += GROUP)
      prepare(x + first * in, x_ + first * padded_, std::min<int64_t>(GROUP, rows - first));
  }

  // The columns begin to end of y. Threads may compute disjoint ones at once.
  void columns(int64_t begin, int64_t end) const {
    switch (rows_) {
      case 1: return columns_of<1>(begin, end);
      case 2: return columns_of<2>(begin, end);
      case 3: return columns_of<3>(begin, end);
      case 4: return columns_of<4>(begin, end);
      case 5: return columns_of<5>(begin, end);
      case 6: return columns_of<6>(begin, end);
      case 7: return columns_of<7>(begin, end);
      default: return columns_of<GROUP>(begin, end);
    }
  }

  int64_t size() const { return out_; }

 private:
  // In the order in which they are read: of each STEP elements, those of all rows of a group.
  void prepare(const T* x, float* to, int64_t group) {
    for (int64_t i = 0; i < padded_; i += STEP)
      for (int64_t r = 0; r < group; r++, to += STEP) {
        Floats a, b;
        widen_some(x + r * in_ + i, in_ - i, a, b);
        store(to, a);
        store(to + LANES, b);
      }
  }

  template <int R>
  void columns_of(int64_t begin, int64_t end) const {
    constexpr int C = std::min(4, std::max(1, ACCUMULATORS / R));
    int64_t c = begin;
    for (; c + C <= end; c += C) each_group<R, C>(c);
    for (; c < end; c++) each_group<R, 1>(c);
  }

  // C columns of y for all rows: the weight comes from memory for the first group only.
  template <int R, int C>
  void each_group(int64_t c) const {
    int64_t first = 0;
    for (; first + R <= rows_; first += R) block<R, C>(first, c);
    if constexpr (R == GROUP)
      for (; first < rows_; first++) rest_of_rows<C>(first, c);
  }

  template <int R, int C>
  void block(int64_t first, int64_t c) const {
    sums<R, C>(x_ + first * padded_, R * STEP, first, c);
  }

  // A row of the last group, which has fewer rows than GROUP.
  template <int C>
  void rest_of_rows(int64_t row, int64_t c) const {
    const int64_t first = row / GROUP * GROUP;
    const int64_t group = std::min<int64_t>(GROUP, rows_ - first);
    sums<1, C>(x_ + first * padded_ + (row - first) * STEP, group * STEP, row, c);
  }

  // The sums of R rows and C columns; `step` is from STEP elements of x to the next ones.
  template <int R, int C>
  void sums(const float* x, int64_t step, int64_t row, int64_t c) const {
    Floats sum[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int j = 0; j < C; j++) sum[r][j] = Floats{};
    const T* weight = weight_ + c * stride_;
    for (int64_t i = 0; i < whole_; i += STEP, x += step) {
      Floats a[C], b[C];
#pragma GCC unroll 8
      for (int j = 0; j < C; j++) {
        const T* from = weight + j * stride_ + i;
        widen(from, a[j], b[j]);
        // What is further on in the row, or the same of the next block of columns: as measured.
        __builtin_prefetch(sizeof(T) == 4 ? from + AHEAD : from + C * stride_, 0, 2);
      }
      add<R, C>(x, a, b, sum);
    }
    if (whole_ != in_) {
      Floats a[C], b[C];
      for (int j = 0; j < C; j++)
        widen_rest(weight + j * stride_ + whole_, in_ - whole_, a[j], b[j]);
      add<R, C>(x, a, b, sum);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int j = 0; j < C; j++) narrow(total(sum[r][j]), y_[(row + r) * out_ + c + j]);
  }

  template <int R, int C>
  static inline void add(const float* x, Floats* a, Floats* b, Floats (*sum)[C]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Floats even = load<Floats>(x + r * STEP), odd = load<Floats>(x + r * STEP + LANES);
#pragma GCC unroll 8
      for (int j = 0; j < C; j++) {
        sum[r][j] += a[j] * even;
        sum[r][j] += b[j] * odd;
      }
    }
  }

  const T* weight_;
  Y* y_;
  int64_t rows_, in_, out_, stride_, whole_, padded_;
  std::unique_ptr<float[]> memory_;
  float* x_;
};

}  // namespace gemma_hub
