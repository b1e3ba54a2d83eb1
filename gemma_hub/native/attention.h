// Attention of one query a row over its cache, at the speed at which the cache is read.
//
// out (rows, heads, size), for q of the same shape, keys and values (rows, slots, kv_heads, size),
// and visible (rows, slots). A row that sees nothing averages over all slots. Everything is in
// float32 but for what is read and the result. The slots are taken in pieces of a fixed length whose
// results are put together in order, so that they do not depend on the number of threads.

#pragma once

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "products.h"

namespace gemma_hub {

struct AttentionShape {
  int64_t rows, slots, heads, kv_heads, size;
  int64_t row_stride;  // of keys and values: from a row to the next, in elements
  float scale;
};

template <class T>
class Attention {
 public:
  Attention(const T* q, const T* keys, const T* values, const bool* visible, T* out,
            AttentionShape shape)
      : values_(values), visible_(visible), out_(out), shape_(shape),
        share_(shape.heads / shape.kv_heads), steps_((shape.size + STEP - 1) / STEP),
        pieces_((shape.slots + PIECE - 1) / PIECE), sees_(shape.rows, false) {
    const int64_t heads = count() * share_, scores = shape.rows * shape.heads * shape.slots;
    // Kept by the thread: to ask the system for memory takes as long as to read a short cache.
    static thread_local std::vector<float> memory;
    memory.resize(std::max<size_t>(memory.size(), scores + heads * (2 + steps_ * STEP)));
    scores_ = memory.data();
    most_ = scores_ + scores;
    sum_ = most_ + heads;
    mean_ = sum_ + heads;
    for (int64_t r = 0; r < shape.rows; r++) {
      const bool* row = visible + r * shape.slots;
      sees_[r] = std::any_of(row, row + shape.slots, [](bool v) { return v; });
      for (int64_t k = 0; k < shape.kv_heads; k++)
        products_.emplace_back(keys + r * shape.row_stride + k * shape.size,
                               q + (r * shape.heads + k * share_) * shape.size,
                               scores_ + (r * shape.heads + k * share_) * shape.slots,
                               share_, shape.size, shape.slots, shape.kv_heads * shape.size);
    }
  }

  // Pieces of the work, which threads may do at once; `finish` is for when all are done.
  int64_t count() const { return shape_.rows * shape_.kv_heads * pieces_; }

  void piece(int64_t index) {
    const int64_t begin = index % pieces_ * PIECE, end = std::min(begin + PIECE, shape_.slots);
    const int64_t pair = index / pieces_, row = pair / shape_.kv_heads;
    const bool* visible = visible_ + row * shape_.slots;
    for (int64_t g = 0; g < share_; g++) most_[index * share_ + g] = NOTHING;
    if (sees_[row]) {
      if (std::none_of(visible + begin, visible + end, [](bool v) { return v; })) return;
      products_[pair].columns(begin, end);
    }
    std::vector<float> weights(share_ * PIECE);
    for (int64_t g = 0; g < share_; g++) {
      const float* scores = scores_ + (pair * share_ + g) * shape_.slots;
      if (sees_[row]) {
        weigh(scores + begin, visible + begin, end - begin, index * share_ + g,
              &weights[g * PIECE]);
      } else {
        for (int64_t s = 0; s < end - begin; s++) weights[g * PIECE + s] = 1.0f;
        most_[index * share_ + g] = 0.0f;
        sum_[index * share_ + g] = float(end - begin);
      }
    }
    const int64_t kv_head = pair % shape_.kv_heads, stride = shape_.kv_heads * shape_.size;
    const T* values = values_ + row * shape_.row_stride + begin * stride + kv_head * shape_.size;
    add_values(values, stride, end - begin, weights.data(), &mean_[index * share_ * steps_ * STEP]);
  }

  void finish() {
    for (int64_t head = 0; head < shape_.rows * shape_.heads; head++) {
      const int64_t pair = head / share_, g = head % share_;
      float most = NOTHING, sum = 0.0f;
      for (int64_t p = 0; p < pieces_; p++) most = std::max(most, most_[at(pair, p, g)]);
      std::vector<float> mean(steps_ * STEP, 0.0f);
      for (int64_t p = 0; p < pieces_; p++) {
        const int64_t i = at(pair, p, g);
        if (most_[i] == NOTHING) continue;
        const float factor = std::exp(most_[i] - most);
        sum += factor * sum_[i];
        for (int64_t h = 0; h < steps_ * STEP; h++) mean[h] += factor * mean_[i * steps_ * STEP + h];
      }
      for (int64_t h = 0; h < shape_.size; h++) {
        const int64_t from = h / STEP * STEP + place(T{}, int(h % STEP));
        narrow(mean[from] / sum, out_[head * shape_.size + h]);
      }
    }
  }

 private:
  static constexpr int64_t PIECE = 128, FEW = 16;
  static constexpr float NOTHING = -std::numeric_limits<float>::infinity();

  int64_t at(int64_t pair, int64_t piece, int64_t g) const {
    return (pair * pieces_ + piece) * share_ + g;
  }

  // The weights of one head relative to the largest; their sum and that largest at `place`.
  void weigh(const float* scores, const bool* visible, int64_t count, int64_t place, float* to) {
    for (int64_t s = 0; s < count; s++) to[s] = visible[s] ? scores[s] * shape_.scale : NOTHING;
    for (int64_t s = count; s < PIECE; s++) to[s] = NOTHING;
    Floats most = Floats{} + NOTHING, sum = Floats{};
    for (int64_t s = 0; s < PIECE; s += LANES) {
      const Floats x = load<Floats>(to + s);
      most = x > most ? x : most;
    }
    const float largest = *std::max_element((float*)&most, (float*)&most + LANES);
    if (largest == NOTHING) {  // infinitely small ones, which weigh nothing, or none is a number
      const float all = std::accumulate(to, to + PIECE, 0.0f);
      most_[place] = all == all ? NOTHING : 0.0f;
      sum_[place] = all;
      return;
    }
    for (int64_t s = 0; s < PIECE; s += LANES) {
      const Floats y = exp_of_negative(load<Floats>(to + s) - largest);
      sum += y;
      store(to + s, y);
    }
    most_[place] = largest;
    sum_[place] = total(sum);
  }

  // For each head of a pair, the sum of the values times its weights.
  void add_values(const T* values, int64_t stride, int64_t count, const float* weights, float* to) {
    for (int64_t g = 0; g < share_; g += GROUP)
      add_group(std::min<int64_t>(GROUP, share_ - g), values, stride, count, weights + g * PIECE,
                to + g * steps_ * STEP);
  }

  void add_group(int64_t heads, const T* values, int64_t stride, int64_t count,
                 const float* weights, float* to) {
    switch (heads) {
      case 1: return add_heads<1>(values, stride, count, weights, to);
      case 2: return add_heads<2>(values, stride, count, weights, to);
      case 3: return add_heads<3>(values, stride, count, weights, to);
      case 4: return add_heads<4>(values, stride, count, weights, to);
      case 5: return add_heads<5>(values, stride, count, weights, to);
      case 6: return add_heads<6>(values, stride, count, weights, to);
      case 7: return add_heads<7>(values, stride, count, weights, to);
      default: return add_heads<GROUP>(values, stride, count, weights, to);
    }
  }

  // A few slots at a time, so that the values are read in the order in which they are stored.
  template <int G>
  void add_heads(const T* values, int64_t stride, int64_t count, const float* weights, float* to) {
    std::fill(to, to + G * steps_ * STEP, 0.0f);
    for (int64_t first = 0; first < count; first += FEW)
      for (int64_t step = 0; step < steps_; step++)
        add_step<G>(values + first * stride + step * STEP, stride, std::min(FEW, count - first),
                    shape_.size - step * STEP, weights + first, to + step * STEP);
  }

  template <int G>
  void add_step(const T* values, int64_t stride, int64_t count, int64_t size, const float* weights,
                float* to) {
    Floats sum[G][2];
#pragma GCC unroll 8
    for (int g = 0; g < G; g++) {
      sum[g][0] = load<Floats>(to + g * steps_ * STEP);
      sum[g][1] = load<Floats>(to + g * steps_ * STEP + LANES);
    }
    for (int64_t s = 0; s < count; s++) {
      Floats a, b;
      widen_some(values + s * stride, size, a, b);
      __builtin_prefetch(values + (s + FEW) * stride, 0, 3);  // of the next few slots
#pragma GCC unroll 8
      for (int g = 0; g < G; g++) {
        sum[g][0] += a * weights[g * PIECE + s];
        sum[g][1] += b * weights[g * PIECE + s];
      }
    }
#pragma GCC unroll 8
    for (int g = 0; g < G; g++) {
      store(to + g * steps_ * STEP, sum[g][0]);
      store(to + g * steps_ * STEP + LANES, sum[g][1]);
    }
  }

  const T* values_;
  const bool* visible_;
  T* out_;
  const AttentionShape shape_;
  const int64_t share_;   // heads that read the same keys
  const int64_t steps_;   // of STEP elements in a head
  const int64_t pieces_;  // of a row's slots
  std::vector<char> sees_;
  float *scores_, *most_, *sum_, *mean_;
  std::vector<Product<T, float>> products_;
};

}  // namespace gemma_hub
