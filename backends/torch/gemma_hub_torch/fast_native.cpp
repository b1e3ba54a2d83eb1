// gemma_hub/native for PyTorch: on its threads, which are OpenMP's.

#include "attention.h"
#include "fused.h"
#include "multiply.h"

template <class T>
static void multiply(const void* weight, const void* x, void* y, int64_t rows, int64_t in,
                     int64_t out, int threads) {
  gemma_hub::multiply(static_cast<const T*>(weight), static_cast<const T*>(x), static_cast<T*>(y),
                      rows, in, out, [out, threads](const auto& product) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int t = 0; t < threads; t++) product.columns(out * t / threads, out * (t + 1) / threads);
  });
}

template <class T>
static void attend(const void* q, const void* keys, const void* values, const void* visible,
                   void* out, gemma_hub::AttentionShape shape, int threads) {
  gemma_hub::Attention<T> attention(static_cast<const T*>(q), static_cast<const T*>(keys),
                                    static_cast<const T*>(values),
                                    static_cast<const bool*>(visible), static_cast<T*>(out), shape);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < attention.count(); i++) attention.piece(i);
  attention.finish();
}

template <class T>
static void normalize(const void* x, const void* weight, void* y, int64_t rows, int64_t size,
                      float eps, float offset, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 1)
  for (int64_t r = 0; r < rows; r++)
    gemma_hub::normalize(static_cast<const T*>(x) + r * size, static_cast<const T*>(weight),
                         static_cast<T*>(y) + r * size, size, eps, offset);
}

template <class T>
static void gated(const void* gate, const void* up, void* y, int64_t rows, int64_t size,
                  int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 1)
  for (int64_t r = 0; r < rows; r++)
    gemma_hub::gated(static_cast<const T*>(gate) + r * size, static_cast<const T*>(up) + r * size,
                     static_cast<T*>(y) + r * size, size);
}

#define DEFINE(NAME, T)                                                                           \
  extern "C" void product_##NAME(const void* weight, const void* x, void* y, int64_t rows,        \
                                 int64_t in, int64_t out, int threads) {                          \
    multiply<T>(weight, x, y, rows, in, out, threads);                                            \
  }                                                                                               \
  extern "C" void attend_##NAME(const void* q, const void* keys, const void* values,              \
                                const void* visible, void* out, int64_t rows, int64_t slots,      \
                                int64_t heads, int64_t kv_heads, int64_t size,                    \
                                int64_t row_stride, float scale, int threads) {                   \
    attend<T>(q, keys, values, visible, out,                                                      \
              {rows, slots, heads, kv_heads, size, row_stride, scale}, threads);                  \
  }                                                                                               \
  extern "C" void normalize_##NAME(const void* x, const void* weight, void* y, int64_t rows,      \
                                   int64_t size, float eps, float offset, int threads) {          \
    normalize<T>(x, weight, y, rows, size, eps, offset, threads);                                 \
  }                                                                                               \
  extern "C" void gated_##NAME(const void* gate, const void* up, void* y, int64_t rows,           \
                               int64_t size, int threads) {                                       \
    gated<T>(gate, up, y, rows, size, threads);                                                   \
  }

DEFINE(float32, float)
DEFINE(bfloat16, gemma_hub::BFloat16)
