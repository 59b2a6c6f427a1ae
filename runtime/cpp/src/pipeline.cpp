#include "pipeline.hpp"

#include <algorithm>
#include <cstdio>

#include "error.hpp"

namespace svd_trt::detail {

Pipeline::Pipeline(const std::string &path, const DeviceOptions &options, bool verify) {
  check_device(options); // before minutes of hashing
  auto shared = std::make_shared<Shared>();
  shared->bundle = open_bundle(std::filesystem::u8path(path), verify);
  shared->networks = std::make_unique<Networks>(shared->bundle, options);
  shared_ = std::move(shared);
}

std::shared_ptr<Stream> Pipeline::open(Settings settings, std::vector<Picture> pictures, std::vector<float> latents,
                                       bool frames_on_device, Progress progress) {
  if (frames_on_device && !shared_->networks->on_gpu())
    throw argument_error("frames_on_device needs a GPU provider; on the CPU, frames are in the host's memory");
  auto stream = std::make_shared<Stream>();
  stream->sigmas.assign(settings.sigmas.begin(), settings.sigmas.end());
  char background[8];
  std::snprintf(background, sizeof background, "#%02x%02x%02x", settings.background[0], settings.background[1],
                settings.background[2]);
  stream->background = background;
  stream->generation = std::make_unique<Generation>(shared_, std::move(settings), std::move(pictures),
                                                    std::move(latents), frames_on_device, std::move(progress));
  const std::lock_guard<std::mutex> lock(mutex_);
  streams_.erase(std::remove_if(streams_.begin(), streams_.end(), [](const auto &one) { return one.expired(); }),
                 streams_.end());
  streams_.push_back(stream);
  return stream;
}

void Pipeline::cancel(const std::string &reason) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const std::weak_ptr<Stream> &one : streams_)
    if (const std::shared_ptr<Stream> stream = one.lock()) stream->generation->cancel(reason);
}

} // namespace svd_trt::detail
