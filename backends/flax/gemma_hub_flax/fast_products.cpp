// gemma_hub/native/products.h for JAX: as a function that XLA's programs call, on their threads.

#include "products.h"

#include <atomic>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

constexpr int64_t SLICES = 4;  // of each thread: one that is interrupted leaves the rest to others

// Slices of the columns, which whoever comes takes one by one. The caller takes part, so that all
// are done although no other thread is free; it waits for those only that another has begun.
template <class T>
struct Work {
  Work(const T* weight, const T* x, T* y, int64_t rows, int64_t in, int64_t out, int64_t slices)
      : product(weight, x, y, rows, in, out), slices(slices) {}

  void take() {
    const int64_t out = product.size();
    for (int64_t s; (s = next.fetch_add(1)) < slices; done.fetch_add(1))
      product.columns(out * s / slices, out * (s + 1) / slices);
  }

  const gemma_hub::Product<T> product;
  const int64_t slices;
  std::atomic<int64_t> next{0}, done{0};
};

template <class T>
static void run(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& weight,
                ffi::AnyBuffer& y) {
  const int64_t rows = x.dimensions()[0], in = x.dimensions()[1], out = weight.dimensions()[0];
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  auto work = std::make_shared<Work<T>>(
      static_cast<const T*>(weight.untyped_data()), static_cast<const T*>(x.untyped_data()),
      static_cast<T*>(y.untyped_data()), rows, in, out, threads == 1 ? 1 : SLICES * threads);
  for (int64_t t = 1; t < threads; t++) pool.Schedule([work] { work->take(); });
  work->take();
  while (work->done.load() < work->slices) std::this_thread::yield();
}

static ffi::Error product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                          ffi::Result<ffi::AnyBuffer> y) {
  switch (x.element_type()) {
    case ffi::F32: run<float>(pool, x, weight, *y); break;
    case ffi::BF16: run<gemma_hub::BFloat16>(pool, x, weight, *y); break;
    default: return ffi::Error::InvalidArgument("product: float32 and bfloat16 only");
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_hub_product, product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
