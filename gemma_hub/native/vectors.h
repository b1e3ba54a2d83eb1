// Vectors of float32, and float32 and bfloat16 numbers as such.
//
// A 16-bit number becomes float32 by a shift, which needs no instruction for bfloat16. Two vectors
// hold the even and then the odd of the same elements: `place` is where each of them is.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

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

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

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

// The nearest numbers of a type, as float32. What is not a number came from one in 16 bits or from
// the processor, and has nothing in its last bits that could be carried.
inline Floats rounded(float, Floats v) { return v; }

inline Floats rounded(BFloat16, Floats v) {
  const Words bits = (Words)v;
  return (Floats)((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

// The converse of `widen`.
inline void narrow(Floats a, Floats b, float* to) {
  store(to, a);
  store(to + LANES, b);
}

inline void narrow(Floats a, Floats b, BFloat16* to) {
  const Words even = (Words)rounded(BFloat16{}, a), odd = (Words)rounded(BFloat16{}, b);
  const Words pairs = even >> 16 | odd;
  std::memcpy(to, &pairs, sizeof pairs);
}

// LANES elements one after the other.
inline void narrow_in_order(Floats v, BFloat16* to) {
  typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));
  const Halves bits = __builtin_convertvector((Words)rounded(BFloat16{}, v) >> 16, Halves);
  std::memcpy(to, &bits, sizeof bits);
}

template <int N>
struct Lanes {
  typedef float Vector __attribute__((vector_size(4 * N)));
};

// The sum of N lanes, by halves.
template <int N = LANES>
inline float total(typename Lanes<N>::Vector v) {
  if constexpr (N == 2) {
    return v[0] + v[1];
  } else {
    typename Lanes<N / 2>::Vector halves[2];
    std::memcpy(halves, &v, sizeof v);
    return total<N / 2>(halves[0] + halves[1]);
  }
}

// Where element i of STEP is, in the two vectors of `widen` one after the other.
inline int place(float, int i) { return i; }
inline int place(BFloat16, int i) { return i % 2 * LANES + i / 2; }

// Fewer than STEP elements, with zeros behind them.
template <class T>
inline void widen_rest(const T* from, int64_t count, Floats& a, Floats& b) {
  T rest[STEP] = {};
  std::memcpy(rest, from, count * sizeof(T));
  widen(rest, a, b);
}

// STEP elements where there are so many.
template <class T>
inline void widen_some(const T* from, int64_t count, Floats& a, Floats& b) {
  if (count >= STEP) {
    widen(from, a, b);
  } else {
    widen_rest(from, count, a, b);
  }
}

// The converse of `widen_some`.
template <class T>
inline void narrow_some(Floats a, Floats b, int64_t count, T* to) {
  if (count >= STEP) {
    narrow(a, b, to);
  } else {
    T all[STEP];
    narrow(a, b, all);
    std::memcpy(to, all, count * sizeof(T));
  }
}

// exp(x) of x <= 0, with a relative error of a few units in the last place; 0 below -87.
inline Floats exp_of_negative(Floats x) {
  const Floats low = Floats{} - 87.0f;
  const Words is_low = (Words)(x < low);
  x = x < low ? low : x;
  // x = n log 2 + r: the number that is added leaves n in the last bits.
  const float to_last_bits = 12582912.0f;
  const Floats shifted = x * 1.44269504089f + to_last_bits;
  const Floats n = shifted - to_last_bits;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats y = Floats{} + 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const Words power = ((Words)shifted + 127u) << 23;  // 2 to the n
  return (Floats)((Words)(y * (Floats)power) & ~is_low);
}

}  // namespace gemma_hub
