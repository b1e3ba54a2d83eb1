// gemma_hub/native for JAX: functions that XLA's programs call, on their threads.

#include "attention.h"
#include "multiply.h"

#include <atomic>
#include <functional>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

constexpr int64_t SLICES = 4;  // of each thread: one that is interrupted leaves the rest to others

// Pieces of work that whoever comes takes one by one.
struct Pieces {
  void take() {
    for (int64_t i; (i = next.fetch_add(1)) < count; done.fetch_add(1)) piece(i);
  }

  const int64_t count;
  const std::function<void(int64_t)> piece;
  std::atomic<int64_t> next{0}, done{0};
};

// Calls piece(0) to piece(count - 1). The caller takes part, so that all are done although no other
// thread is free; it waits for those only that another has begun.
static void run(ffi::ThreadPool& pool, int64_t count, std::function<void(int64_t)> piece) {
  // A thread may come when all is done and the caller gone.
  std::shared_ptr<Pieces> pieces(new Pieces{count, std::move(piece)});
  const int64_t helpers = std::min(pool.num_threads(), count) - 1;
  for (int64_t t = 0; t < helpers; t++) pool.Schedule([pieces] { pieces->take(); });
  pieces->take();
  while (pieces->done.load() < count) std::this_thread::yield();
}

template <class T>
static void product_of(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& weight,
                       ffi::AnyBuffer& y) {
  const int64_t rows = x.dimensions()[0], in = x.dimensions()[1], out = weight.dimensions()[0];
  const int64_t slices = pool.num_threads() > 1 ? SLICES * pool.num_threads() : 1;
  gemma_hub::multiply(static_cast<const T*>(weight.untyped_data()),
                      static_cast<const T*>(x.untyped_data()), static_cast<T*>(y.untyped_data()),
                      rows, in, out, [&pool, out, slices](const auto& product) {
    run(pool, slices, [&product, out, slices](int64_t s) {
      product.columns(out * s / slices, out * (s + 1) / slices);
    });
  });
}

static ffi::Error product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                          ffi::Result<ffi::AnyBuffer> y) {
  switch (x.element_type()) {
    case ffi::F32: product_of<float>(pool, x, weight, *y); break;
    case ffi::BF16: product_of<gemma_hub::BFloat16>(pool, x, weight, *y); break;
    default: return ffi::Error::InvalidArgument("product: float32 and bfloat16 only");
  }
  return ffi::Error::Success();
}

template <class T>
static void attention_of(ffi::ThreadPool& pool, const ffi::AnyBuffer& q, const ffi::AnyBuffer& keys,
                         const ffi::AnyBuffer& values, const ffi::AnyBuffer& visible, float scale,
                         ffi::AnyBuffer& out) {
  const auto shape = keys.dimensions();  // rows, slots, kv_heads, size
  gemma_hub::Attention<T> attention(
      static_cast<const T*>(q.untyped_data()), static_cast<const T*>(keys.untyped_data()),
      static_cast<const T*>(values.untyped_data()),
      static_cast<const bool*>(visible.untyped_data()), static_cast<T*>(out.untyped_data()),
      {shape[0], shape[1], q.dimensions()[1], shape[2], shape[3], shape[1] * shape[2] * shape[3],
       scale});
  run(pool, attention.count(), [&attention](int64_t i) { attention.piece(i); });
  attention.finish();
}

static ffi::Error attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer keys,
                         ffi::AnyBuffer values, ffi::AnyBuffer visible, float scale,
                         ffi::Result<ffi::AnyBuffer> out) {
  switch (q.element_type()) {
    case ffi::F32: attention_of<float>(pool, q, keys, values, visible, scale, *out); break;
    case ffi::BF16:
      attention_of<gemma_hub::BFloat16>(pool, q, keys, values, visible, scale, *out);
      break;
    default: return ffi::Error::InvalidArgument("attend: float32 and bfloat16 only");
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_hub_product, product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_hub_attend, attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Ret<ffi::AnyBuffer>());
