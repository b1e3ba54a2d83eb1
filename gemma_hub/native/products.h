// Products of few rows with a row-major matrix, at the speed at which memory is read.
//
// y (rows, out) = x (rows, in) times weight (out, in) transposed. The sums are in float32, and are
// the same bit by bit for any number of rows and threads: each is of the same terms in the same
// order. Types are float32 and bfloat16; x, weight and y have the same.
//
// Weights of 16 bits become float32 by a shift, which needs no instruction for bfloat16. For that,
// x is prepared first: each two vectors of it hold the even and then the odd of the same elements.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

namespace gemma_hub {

#if defined(__AVX512F__)
constexpr int BYTES = 64, ACCUMULATORS = 24;
#elif defined(__AVX__)
constexpr int BYTES = 32, ACCUMULATORS = 8;
#elif defined(__ARM_NEON)
constexpr int BYTES = 16, ACCUMULATORS = 24;
#else
constexpr int BYTES = 16, ACCUMULATORS = 8;
#endif

constexpr int LANES = BYTES / 4;
constexpr int STEP = 2 * LANES;  // elements that are read at once from a row of the weight
constexpr int GROUP = 8;         // rows of x that share one read of the weight

typedef float Floats __attribute__((vector_size(BYTES)));
typedef uint32_t Words __attribute__((vector_size(BYTES)));

struct BFloat16 {
  uint16_t bits;
};

template <class Vector>
inline Vector load(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// STEP elements of float32: the first LANES, and the others.
inline void widen(const float* from, Floats& a, Floats& b) {
  a = load<Floats>(from);
  b = load<Floats>(from + LANES);
}

// STEP elements of bfloat16: the even ones, and the odd ones.
inline void widen(const BFloat16* from, Floats& a, Floats& b) {
  const Words pairs = load<Words>(from);
  a = (Floats)(pairs << 16);
  b = (Floats)(pairs & 0xffff0000u);
}

inline void narrow(float value, float& to) { to = value; }

inline void narrow(float value, BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t to_even = 0x7fffu + ((bits >> 16) & 1u);
  to.bits = value == value ? uint16_t((bits + to_even) >> 16) : uint16_t((bits >> 16) | 0x40u);
}

inline float total(Floats v) {
  float lanes[LANES];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <class T>
class Product {
 public:
  Product(const T* weight, const T* x, T* y, int64_t rows, int64_t in, int64_t out)
      : weight_(weight), y_(y), rows_(rows), in_(in), out_(out), whole_(in / STEP * STEP) {
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
        if (i < whole_) {
          widen(x + r * in_ + i, a, b);
        } else {
          widen_rest(x + r * in_ + i, a, b);
        }
        std::memcpy(to, &a, sizeof a);
        std::memcpy(to + LANES, &b, sizeof b);
      }
  }

  // The last elements of a row, with zeros behind them.
  void widen_rest(const T* from, Floats& a, Floats& b) const {
    T rest[STEP] = {};
    std::memcpy(rest, from, (in_ - whole_) * sizeof(T));
    widen(rest, a, b);
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

  // The sums of R rows and C columns; `stride` is from STEP elements of x to the next ones.
  template <int R, int C>
  void sums(const float* x, int64_t stride, int64_t row, int64_t c) const {
    Floats sum[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int j = 0; j < C; j++) sum[r][j] = Floats{};
    const T* weight = weight_ + c * in_;
    for (int64_t i = 0; i < whole_; i += STEP, x += stride) {
      Floats a[C], b[C];
#pragma GCC unroll 8
      for (int j = 0; j < C; j++) {
        const T* from = weight + j * in_ + i;
        widen(from, a[j], b[j]);
        __builtin_prefetch(from + C * in_, 0, 2);  // the same of the next block of columns
      }
      add<R, C>(x, a, b, sum);
    }
    if (whole_ != in_) {
      Floats a[C], b[C];
      for (int j = 0; j < C; j++) widen_rest(weight + j * in_ + whole_, a[j], b[j]);
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
  T* y_;
  int64_t rows_, in_, out_, whole_, padded_;
  std::unique_ptr<float[]> memory_;
  float* x_;
};

}  // namespace gemma_hub
