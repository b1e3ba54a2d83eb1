// Products with a bfloat16 matrix by AMX, the matrix unit of some of Intel's processors.
//
// What products.h computes, and as invariant: each sum is one chain, two elements at a time, however
// many rows there are. Up to 16 rows take as long as one, which is as long as the weight takes to be
// read. Subnormal numbers count as zero, as the unit has it.
//
// A tile of the weight has 32 elements of 16 of its rows, one of x the same elements of all rows, by
// pairs of elements, and their product 16 columns of y.

#pragma once

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#define GEMMA_HUB_HAS_TILES 1

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

#include "vectors.h"

namespace gemma_hub {

constexpr int64_t SIDE = 16, DEPTH = 32;

// Whether the system lets this process use the unit, whose registers it has to save.
inline bool may_use_tiles() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool may = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return may;
}

struct alignas(64) TileConfiguration {
  // A register's rows, and the bytes of each.
  void set(int tile, int64_t count, int64_t size) {
    rows[tile] = uint8_t(count);
    bytes[tile] = uint16_t(size);
  }

  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Products with up to SIDE rows.
class TileProduct {
 public:
  TileProduct(const BFloat16* weight, const BFloat16* x, BFloat16* y, int64_t rows, int64_t in,
              int64_t out)
      : weight_(weight), y_(y), rows_(rows), in_(in), out_(out), whole_(in / DEPTH * DEPTH),
        x_((in + DEPTH - 1) / DEPTH * DEPTH * rows) {
    for (int64_t row = 0; row < rows; row++)
      for (int64_t i = 0; i < in; i += 2)
        std::memcpy(&x_[(i / 2 * rows + row) * 2], x + row * in + i,
                    (i + 1 < in ? 2 : 1) * sizeof(BFloat16));
  }

  // The columns begin to end of y. Threads may compute disjoint ones at once.
  void columns(int64_t begin, int64_t end) const {
    const int64_t whole = begin + (end - begin) / SIDE * SIDE;
    configure(SIDE);
    for (int64_t c = begin; c < whole; c += SIDE) block(c, SIDE);
    if (whole < end) {
      configure(end - whole);
      block(whole, end - whole);
    }
    _tile_release();
  }

 private:
  static constexpr int64_t AHEAD = 4 * DEPTH;

  // Some compilers take registers as numerals only: 0 is for sums, 1 the weight, 2 x.
  void configure(int64_t columns) const {
    TileConfiguration configuration;
    configuration.set(0, columns, rows_ * 4);
    configuration.set(1, columns, DEPTH * 2);
    configuration.set(2, DEPTH / 2, rows_ * 4);
    _tile_loadconfig(&configuration);
  }

  // `count` columns of y from c on.
  void block(int64_t c, int64_t count) const {
    const BFloat16* weight = weight_ + c * in_;
    _tile_zero(0);
    for (int64_t i = 0; i < whole_; i += DEPTH) {
      _tile_loadd(2, &x_[i * rows_], rows_ * 4);
      _tile_loadd(1, weight + i, in_ * 2);
      _tile_dpbf16ps(0, 1, 2);
      for (int64_t j = 0; j < count; j++) __builtin_prefetch(weight + j * in_ + i + AHEAD, 0, 2);
    }
    if (whole_ != in_) {
      BFloat16 rest[SIDE][DEPTH] = {};
      for (int64_t j = 0; j < count; j++)
        std::memcpy(rest[j], weight + j * in_ + whole_, (in_ - whole_) * sizeof(BFloat16));
      _tile_loadd(2, &x_[whole_ * rows_], rows_ * 4);
      _tile_loadd(1, rest, DEPTH * 2);
      _tile_dpbf16ps(0, 1, 2);
    }
    float sums[SIDE * SIDE];
    _tile_stored(0, sums, rows_ * 4);
    finish(sums, c, count);
  }

  // Sums (count, rows) rounded into y.
  void finish(const float* sums, int64_t c, int64_t count) const {
    for (int64_t r = 0; r < rows_; r++) {
      float row[SIDE] = {};
      for (int64_t j = 0; j < count; j++) row[j] = sums[j * rows_ + r];
      BFloat16 rounded[SIDE];
      narrow_in_order(load<Floats>(row), rounded);
      std::memcpy(y_ + r * out_ + c, rounded, count * sizeof(BFloat16));
    }
  }

  const BFloat16* weight_;
  BFloat16* y_;
  const int64_t rows_, in_, out_, whole_;
  std::vector<BFloat16> x_;  // by pairs of elements: those of all rows
};

}  // namespace gemma_hub

#endif
