// gemma_hub/native/products.h for PyTorch: on its threads, which are OpenMP's.

#include "products.h"

template <class T>
static void run(const void* weight, const void* x, void* y, int64_t rows, int64_t in, int64_t out,
                int threads) {
  const gemma_hub::Product<T> product(static_cast<const T*>(weight), static_cast<const T*>(x),
                                      static_cast<T*>(y), rows, in, out);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int t = 0; t < threads; t++) product.columns(out * t / threads, out * (t + 1) / threads);
}

extern "C" void product_float32(const void* weight, const void* x, void* y, int64_t rows,
                                int64_t in, int64_t out, int threads) {
  run<float>(weight, x, y, rows, in, out, threads);
}

extern "C" void product_bfloat16(const void* weight, const void* x, void* y, int64_t rows,
                                 int64_t in, int64_t out, int threads) {
  run<gemma_hub::BFloat16>(weight, x, y, rows, in, out, threads);
}
