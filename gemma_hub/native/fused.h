// What a layer does between its products, each in one pass over the numbers.
//
// In float32, and rounded where the plain operations round. An element's result depends on its row
// only.

#pragma once

#include <cmath>

#include "vectors.h"

namespace gemma_hub {

// y = x / rms(x) * (offset + weight), of one row.
template <class T>
void normalize(const T* x, const T* weight, T* y, int64_t size, float eps, float offset) {
  Floats even = Floats{}, odd = Floats{};
  for (int64_t i = 0; i < size; i += STEP) {
    Floats a, b;
    widen_some(x + i, size - i, a, b);
    even += a * a;
    odd += b * b;
  }
  const float scale = 1.0f / std::sqrt(total(even + odd) / float(size) + eps);
  for (int64_t i = 0; i < size; i += STEP) {
    Floats a, b, c, d;
    widen_some(x + i, size - i, a, b);
    widen_some(weight + i, size - i, c, d);
    narrow_some(a * scale * (c + offset), b * scale * (d + offset), size - i, y + i);
  }
}

// x times the normal distribution's function at x, by its approximation with tanh, which is written
// as a logistic function: nothing is lost where that is near 0.
inline Floats gelu(Floats x) {
  const Floats u = x * 1.59576912160573f * (x * x * 0.044715f + 1.0f);
  const Floats e = exp_of_negative(u < 0.0f ? u : -u);
  return x * (u < 0.0f ? e : Floats{} + 1.0f) / (e + 1.0f);
}

// y = gelu(gate) * up.
template <class T>
void gated(const T* gate, const T* up, T* y, int64_t count) {
  for (int64_t i = 0; i < count; i += STEP) {
    Floats a, b, c, d;
    widen_some(gate + i, count - i, a, b);
    widen_some(up + i, count - i, c, d);
    narrow_some(rounded(T{}, gelu(a)) * c, rounded(T{}, gelu(b)) * d, count - i, y + i);
  }
}

}  // namespace gemma_hub
