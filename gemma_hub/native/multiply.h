// The product of few rows by the fastest way that this processor has.

#pragma once

#include <type_traits>

#include "products.h"
#include "tiles.h"

namespace gemma_hub {

// Gives `run` the product, whose `columns` it calls for all columns of y, from as many threads as it
// likes. Of more rows than one takes there are several.
template <class T, class Run>
void multiply(const T* weight, const T* x, T* y, int64_t rows, int64_t in, int64_t out, Run run) {
#ifdef GEMMA_HUB_HAS_TILES
  if constexpr (std::is_same_v<T, BFloat16>)
    if (may_use_tiles()) {
      for (int64_t row = 0; row < rows; row += SIDE)
        run(TileProduct(weight, x + row * in, y + row * out, std::min(SIDE, rows - row), in, out));
      return;
    }
#endif
  if (rows > 0) run(Product<T>(weight, x, y, rows, in, out));
}

}  // namespace gemma_hub
