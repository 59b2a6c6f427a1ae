#include "chunks.hpp"

#include <algorithm>

#include "error.hpp"

namespace svd_trt::detail {
namespace {

constexpr int64_t kMostElements = (int64_t{1} << 31) - 1; // of one tensor, in TensorRT
constexpr int64_t kSmallestEven = 4;

} // namespace

std::vector<int64_t> chunk_sizes(int64_t total, int64_t chunk, const Range &span) {
  std::vector<int64_t> sizes;
  for (int64_t start = 0; start < total; start += chunk) {
    sizes.push_back(std::min(chunk, total - start));
    if (!span.holds(sizes.back()))
      throw argument_error("decoding " + std::to_string(total) + " frames by " + std::to_string(chunk) +
                           " needs a chunk of " + std::to_string(sizes.back()) + ", and this bundle decodes " +
                           span.words() +
                           " frames at a time; choose another decode_chunk_size, or build with another --decode-chunk");
  }
  return sizes;
}

int64_t default_chunk(const Manifest &manifest, int64_t frames, int64_t videos, int64_t height, int64_t width) {
  const Range &span = manifest.range("chunk");
  const int64_t largest = std::max<int64_t>(1, kMostElements / (manifest.model.decoder_channels * height * width));
  std::vector<int64_t> sizes; // that leave a last chunk which the bundle takes
  for (int64_t size = std::min({frames, span.max, largest}); size >= span.min; --size) {
    const int64_t rest = frames * videos % size;
    if (rest == 0 || span.holds(rest)) sizes.push_back(size);
  }
  if (sizes.empty()) return std::min(frames, span.max);
  for (const int64_t size : sizes)
    if (frames % size == 0 && size >= std::min(kSmallestEven, frames)) return size;
  const auto chunks = [&](int64_t size) { return (frames + size - 1) / size; };
  int64_t smallest = sizes.front();
  for (const int64_t size : sizes)
    if (chunks(size) == chunks(sizes.front())) smallest = std::min(smallest, size);
  return smallest;
}

} // namespace svd_trt::detail
