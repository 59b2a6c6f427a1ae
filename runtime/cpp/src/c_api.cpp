#include <cstddef>
#include <cstring>
#include <new>
#include <string>

#include "error.hpp"
#include "golden.hpp"
#include "handles.hpp"
#include "pipeline.hpp"
#include "svd_trt.h"
#include "text.hpp"
#include "version.hpp"

using namespace svd_trt::detail;

namespace {

// Not a string: hosts close pipelines in destructors of global objects, when strings of the thread are gone.
thread_local char last_error[2048];

// Never destroyed: handles may be used, and threads may run, until the process has ended.
auto &pipelines() {
  static auto &handles = *new Handles<Pipeline, svd_trt_pipeline>();
  return handles;
}
auto &streams() {
  static auto &handles = *new Handles<Stream, svd_trt_stream>();
  return handles;
}

constexpr const char *kTooLittleMemory = "the host has too little memory; make a smaller or shorter video";

svd_trt_status failed(svd_trt_status status, std::string_view message) noexcept {
  write_line(message, last_error, sizeof last_error);
  return status;
}

// Runs `work`, which returns a status or nothing; exceptions become a status and a message.
template <class Work> svd_trt_status guarded(Work work) noexcept {
  last_error[0] = 0;
  try {
    if constexpr (std::is_void_v<decltype(work())>) {
      work();
      return SVD_TRT_OK;
    } else {
      return work();
    }
  } catch (const Failure &error) {
    return failed(error.status, error.what());
  } catch (const std::bad_alloc &) {
    return failed(SVD_TRT_MEMORY_ERROR, kTooLittleMemory);
  } catch (const std::length_error &) { // of a container
    return failed(SVD_TRT_MEMORY_ERROR, kTooLittleMemory);
  } catch (const Ort::Exception &error) {
    return failed(SVD_TRT_BACKEND_ERROR, first_line(error.what()));
  } catch (const std::exception &error) {
    return failed(SVD_TRT_INTERNAL_ERROR, first_line(error.what()));
  } catch (...) {
    return failed(SVD_TRT_INTERNAL_ERROR, "an exception of unknown type");
  }
}

template <class Pointer> void require(Pointer pointer, const char *name) {
  if (pointer == nullptr) throw argument_error(std::string(name) + " is null");
}

std::shared_ptr<Pipeline> pipeline_of(svd_trt_pipeline *handle) {
  std::shared_ptr<Pipeline> found = pipelines().find(handle);
  if (!found)
    throw Failure(SVD_TRT_HANDLE_ERROR, "the pipeline is null or closed; open one with svd_trt_pipeline_open");
  return found;
}

std::shared_ptr<Stream> stream_of(svd_trt_stream *handle) {
  std::shared_ptr<Stream> found = streams().find(handle);
  if (!found) throw Failure(SVD_TRT_HANDLE_ERROR, "the stream is null or closed; open one with svd_trt_stream_open");
  return found;
}

// The size of each structure's first version: the end of the field that was its last one. To add a field, append it to
// the structure in svd_trt.h, where 0 or NULL must mean the behaviour of before, and change nothing here. A field that
// is put between others fails the assertion below, because programs that are compiled already would write elsewhere.
#define SVD_TRT_END(structure, field) (offsetof(structure, field) + sizeof(structure::field))
template <class Struct> constexpr size_t first_size = 0;
template <> constexpr size_t first_size<svd_trt_open_options> = SVD_TRT_END(svd_trt_open_options, cuda_stream);
template <> constexpr size_t first_size<svd_trt_arguments> = SVD_TRT_END(svd_trt_arguments, background);
template <> constexpr size_t first_size<svd_trt_picture> = SVD_TRT_END(svd_trt_picture, stride);
template <> constexpr size_t first_size<svd_trt_stream_options> = SVD_TRT_END(svd_trt_stream_options, reserved);
template <> constexpr size_t first_size<svd_trt_frame> = SVD_TRT_END(svd_trt_frame, reserved);
#undef SVD_TRT_END
static_assert(sizeof(void *) != 8 || (first_size<svd_trt_open_options> == 48 && first_size<svd_trt_arguments> == 152 &&
                                      first_size<svd_trt_picture> == 40 && first_size<svd_trt_stream_options> == 48 &&
                                      first_size<svd_trt_frame> == 64),
              "new fields go to the end of a structure");

template <class Struct> void check_size(size_t size, const char *name) {
  if (size < first_size<Struct> || size > 4096 || size % alignof(Struct) != 0)
    throw argument_error(std::string("the size of a ") + name + " is " + std::to_string(size) + "; call " + name +
                         "_init first");
}

template <class Struct> int32_t reserved_of(const Struct &given) { return given.reserved; }
int32_t reserved_of(const svd_trt_picture &) { return 0; } // it has no such field

// The caller's structure as this version's: shorter ones are filled with `defaults`. A longer one is of a newer
// version; what this version does not know must be zero.
template <class Struct> Struct read(const Struct *given, Struct defaults, const char *name) {
  check_size<Struct>(given->size, name);
  std::memcpy(&defaults, given, std::min(given->size, sizeof(Struct)));
  const auto *bytes = reinterpret_cast<const unsigned char *>(given);
  for (size_t i = sizeof(Struct); i < given->size; ++i)
    if (bytes[i] != 0)
      throw argument_error(std::string("a ") + name + " uses fields that this library does not have; update it");
  if (reserved_of(defaults) != 0)
    throw argument_error(std::string("reserved of a ") + name + " is not 0; call " + name + "_init first");
  defaults.size = sizeof(Struct);
  return defaults;
}

// Writes as much as the caller's structure has room for.
template <class Struct> void write(Struct *given, size_t size, Struct value, const char *name) {
  check_size<Struct>(size, name);
  std::memset(given, 0, size);
  value.size = size;
  std::memcpy(given, &value, std::min(size, sizeof(Struct)));
}

svd_trt_open_options default_open_options() {
  svd_trt_open_options options{};
  options.size = sizeof options;
  options.verify = 1;
  return options;
}

template <class Struct> Struct sized() {
  Struct empty{};
  empty.size = sizeof empty;
  return empty;
}

std::vector<Picture> copy_pictures(const svd_trt_picture *pictures, size_t count) {
  if (count == 0) throw argument_error("no picture was given");
  if (count > 10000) throw argument_error("at most 10000 pictures, not " + std::to_string(count));
  require(pictures, "pictures");
  std::vector<Picture> copies;
  const size_t distance = pictures->size;
  check_size<svd_trt_picture>(distance, "svd_trt_picture");
  for (size_t i = 0; i < count; ++i) {
    const auto *one =
        reinterpret_cast<const svd_trt_picture *>(reinterpret_cast<const char *>(pictures) + i * distance);
    if (one->size != distance) throw argument_error("the pictures of an array have different sizes of structure");
    copies.push_back(copy_picture(read(one, sized<svd_trt_picture>(), "svd_trt_picture")));
  }
  return copies;
}

std::shared_ptr<Stream> open_stream(svd_trt_pipeline *handle, const svd_trt_picture *pictures, size_t count,
                                    const svd_trt_arguments *arguments, const svd_trt_stream_options *options) {
  const std::shared_ptr<Pipeline> pipeline = pipeline_of(handle);
  svd_trt_arguments given = default_arguments(pipeline->manifest());
  if (arguments != nullptr) given = read(arguments, given, "svd_trt_arguments");
  auto chosen = sized<svd_trt_stream_options>();
  if (options != nullptr) chosen = read(options, chosen, "svd_trt_stream_options");
  if (count == 0) throw argument_error("no picture was given");
  Settings settings = resolve(given, pipeline->manifest(), std::min<size_t>(count, 10001));
  if (chosen.latents == nullptr && chosen.latents_count != 0)
    throw argument_error("latents is null, and latents_count is not 0");
  // The count is checked before anything is copied, because it is the caller's claim about memory.
  if (chosen.latents != nullptr) {
    const Model &model = pipeline->manifest().model;
    const size_t wanted = elements({settings.videos, settings.num_frames, model.latent_channels,
                                    settings.height / model.vae_scale_factor, settings.width / model.vae_scale_factor});
    if (chosen.latents_count != wanted)
      throw argument_error("latents must have " + std::to_string(wanted) + " values, not " +
                           std::to_string(chosen.latents_count));
  }
  std::vector<float> latents(chosen.latents, chosen.latents + chosen.latents_count);
  Progress progress;
  if (chosen.progress != nullptr)
    progress = [callback = chosen.progress, user = chosen.user](const char *stage, int64_t done, int64_t total) {
      return callback(user, stage, done, total) == 0;
    };
  std::vector<Picture> copies = copy_pictures(pictures, count);
  for (const Picture &picture : copies)
    check_framed({picture.width, picture.height}, settings.height, settings.width, settings.resize);
  return pipeline->open(std::move(settings), std::move(copies), std::move(latents), chosen.frames_on_device != 0,
                        std::move(progress));
}

svd_trt_frame as_frame(const Generation &generation, const FrameView &view, bool on_device) {
  auto frame = sized<svd_trt_frame>();
  frame.data = view.data;
  frame.width = generation.settings().width, frame.height = generation.settings().height;
  frame.stride = frame.width * 3;
  frame.video = view.video, frame.index = view.index;
  frame.on_device = on_device;
  return frame;
}

} // namespace

extern "C" {

int32_t svd_trt_abi_version(void) { return SVD_TRT_ABI_VERSION; }
const char *svd_trt_version(void) { return SVD_TRT_VERSION; }
const char *svd_trt_last_error(void) { return last_error; }

svd_trt_status svd_trt_open_options_init(svd_trt_open_options *options, size_t size) {
  return guarded([&] {
    require(options, "options");
    write(options, size, default_open_options(), "svd_trt_open_options");
  });
}

svd_trt_status svd_trt_pipeline_open(const char *bundle, const svd_trt_open_options *options,
                                     svd_trt_pipeline **pipeline) {
  return guarded([&] {
    require(bundle, "bundle");
    require(pipeline, "pipeline");
    svd_trt_open_options given = default_open_options();
    if (options != nullptr) given = read(options, given, "svd_trt_open_options");
    const DeviceOptions device{given.provider != nullptr ? given.provider : "cpu",
                               given.provider_library != nullptr ? given.provider_library : "", given.device,
                               given.threads, given.cuda_stream};
    *pipeline = pipelines().add(std::make_shared<Pipeline>(bundle, device, given.verify != 0));
  });
}

svd_trt_status svd_trt_pipeline_close(svd_trt_pipeline *pipeline) {
  return guarded([&] {
    const std::shared_ptr<Pipeline> closed = pipeline_of(pipeline);
    pipelines().remove(pipeline);
    closed->cancel("the pipeline was closed");
    closed->shared()->networks->release(); // a stream that is not closed must not keep them
  });
}

svd_trt_status svd_trt_pipeline_cancel(svd_trt_pipeline *pipeline) {
  return guarded([&] { pipeline_of(pipeline)->cancel("the stream was cancelled"); });
}

svd_trt_status svd_trt_pipeline_release(svd_trt_pipeline *pipeline) {
  return guarded([&] { pipeline_of(pipeline)->shared()->networks->release(); });
}

svd_trt_status svd_trt_pipeline_manifest(svd_trt_pipeline *pipeline, const char **json) {
  return guarded([&] {
    require(json, "json");
    *json = pipeline_of(pipeline)->shared()->bundle.text.c_str();
  });
}

svd_trt_status svd_trt_arguments_init(svd_trt_pipeline *pipeline, svd_trt_arguments *arguments, size_t size) {
  return guarded([&] {
    require(arguments, "arguments");
    write(arguments, size, default_arguments(pipeline_of(pipeline)->manifest()), "svd_trt_arguments");
  });
}

svd_trt_status svd_trt_picture_init(svd_trt_picture *picture, size_t size) {
  return guarded([&] {
    require(picture, "picture");
    write(picture, size, sized<svd_trt_picture>(), "svd_trt_picture");
  });
}

svd_trt_status svd_trt_stream_options_init(svd_trt_stream_options *options, size_t size) {
  return guarded([&] {
    require(options, "options");
    write(options, size, sized<svd_trt_stream_options>(), "svd_trt_stream_options");
  });
}

svd_trt_status svd_trt_stream_open(svd_trt_pipeline *pipeline, const svd_trt_picture *pictures, size_t count,
                                   const svd_trt_arguments *arguments, const svd_trt_stream_options *options,
                                   svd_trt_stream **stream) {
  return guarded([&] {
    require(stream, "stream");
    *stream = streams().add(open_stream(pipeline, pictures, count, arguments, options));
  });
}

svd_trt_status svd_trt_stream_next(svd_trt_stream *stream, svd_trt_frame *frame) {
  return guarded([&]() -> svd_trt_status {
    require(frame, "frame");
    check_size<svd_trt_frame>(frame->size, "svd_trt_frame");
    const std::shared_ptr<Stream> found = stream_of(stream);
    FrameView view{};
    if (!found->generation->next(view)) return SVD_TRT_END;
    write(frame, frame->size, as_frame(*found->generation, view, found->generation->on_device()), "svd_trt_frame");
    return SVD_TRT_OK;
  });
}

svd_trt_status svd_trt_stream_latents(svd_trt_stream *stream, float *data, size_t count, size_t *needed) {
  return guarded([&] {
    const std::shared_ptr<Stream> found = stream_of(stream);
    const size_t wanted = found->generation->latents_count();
    if (data == nullptr) require(needed, "data");
    if (data != nullptr) {
      if (count != wanted)
        throw argument_error("the latents have " + std::to_string(wanted) + " values, not " + std::to_string(count));
      found->generation->latents(data);
    }
    if (needed != nullptr) *needed = wanted;
  });
}

svd_trt_status svd_trt_stream_settings(svd_trt_stream *stream, svd_trt_arguments *settings) {
  return guarded([&] {
    require(settings, "settings");
    check_size<svd_trt_arguments>(settings->size, "svd_trt_arguments");
    const std::shared_ptr<Stream> found = stream_of(stream);
    const Settings &s = found->generation->settings();
    auto a = sized<svd_trt_arguments>();
    a.num_frames = s.num_frames, a.num_inference_steps = s.num_inference_steps;
    a.sigmas = found->sigmas.data(), a.sigmas_count = found->sigmas.size();
    a.min_guidance_scale = s.min_guidance_scale, a.max_guidance_scale = s.max_guidance_scale;
    a.guidance_shape = s.guidance_shape.c_str();
    a.guidance_interval = s.guidance_interval ? s.guidance_interval->data() : nullptr;
    a.fps = s.fps, a.motion_bucket_id = s.motion_bucket_id, a.noise_aug_strength = s.noise_aug_strength;
    a.decode_chunk_size = s.decode_chunk_size, a.deep_every = s.deep_every;
    a.num_videos_per_prompt = s.num_videos_per_prompt;
    if (s.seeds.size() == 1) {
      a.seed = s.seeds[0], a.has_seed = 1;
    } else {
      a.seeds = s.seeds.data(), a.seeds_count = s.seeds.size();
    }
    a.height = s.height, a.width = s.width;
    a.schedule = s.schedule.empty() ? nullptr : s.schedule.c_str();
    a.quality = s.quality.empty() ? nullptr : s.quality.c_str();
    a.sampler = s.sampler.c_str(), a.resize_mode = s.resize_mode.c_str();
    a.background = found->background.c_str();
    write(settings, settings->size, a, "svd_trt_arguments");
  });
}

svd_trt_status svd_trt_stream_videos(svd_trt_stream *stream, int64_t *videos) {
  return guarded([&] {
    require(videos, "videos");
    *videos = stream_of(stream)->generation->settings().videos;
  });
}

svd_trt_status svd_trt_stream_cancel(svd_trt_stream *stream) {
  return guarded([&] { stream_of(stream)->generation->cancel("the stream was cancelled"); });
}

svd_trt_status svd_trt_stream_close(svd_trt_stream *stream) {
  return guarded([&] {
    stream_of(stream)->generation->cancel("the stream was closed");
    streams().remove(stream);
  });
}

svd_trt_status svd_trt_generate(svd_trt_pipeline *pipeline, const svd_trt_picture *pictures, size_t count,
                                const svd_trt_arguments *arguments, const svd_trt_stream_options *options,
                                svd_trt_on_frame on_frame, void *frame_user) {
  return guarded([&]() -> svd_trt_status {
    require(on_frame, "on_frame");
    const std::shared_ptr<Stream> stream = open_stream(pipeline, pictures, count, arguments, options);
    for (FrameView view{}; stream->generation->next(view);) {
      const svd_trt_frame frame = as_frame(*stream->generation, view, stream->generation->on_device());
      if (on_frame(frame_user, &frame) != 0)
        throw Failure(SVD_TRT_CANCELLED, "the frame callback cancelled the stream");
    }
    return SVD_TRT_OK;
  });
}

svd_trt_status svd_trt_pipeline_self_test(svd_trt_pipeline *pipeline, svd_trt_on_check on_check, void *user) {
  return guarded([&] {
    std::string wrong;
    check_golden(pipeline_of(pipeline)->shared(), [&](const std::string &name, double difference, double allowed) {
      if (!(difference <= allowed)) wrong += (wrong.empty() ? "" : ", ") + name;
      if (on_check != nullptr) on_check(user, name.c_str(), difference, allowed);
    });
    if (!wrong.empty())
      throw Failure(SVD_TRT_SELF_TEST_ERROR, "these golden values of the bundle do not hold here: " + wrong);
  });
}

} // extern "C"
