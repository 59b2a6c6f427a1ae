// Every bad input of the C interface gives a code and a message: nothing is leaked, and nothing aborts.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "bundle.hpp"

namespace {

// One pipeline for all cases, because opening one reads the whole bundle.
svd_trt_pipeline *opened_once() {
  static svd_trt_pipeline *pipeline = nullptr;
  if (pipeline == nullptr) REQUIRE(svd_trt_pipeline_open(bundle_path().c_str(), nullptr, &pipeline) == SVD_TRT_OK);
  return pipeline;
}

struct Open {
  svd_trt_pipeline *pipeline = opened_once();
  TestPicture test = make_picture(40, 30);
  svd_trt_picture picture{sizeof(svd_trt_picture), test.pixels.data(), test.width, test.height, 0};
  svd_trt_arguments arguments{};

  Open() { REQUIRE(svd_trt_arguments_init(pipeline, &arguments, sizeof arguments) == SVD_TRT_OK); }

  // Opens a stream; the message if it is refused with `status`.
  std::string refused(svd_trt_status status) {
    svd_trt_stream *stream = nullptr;
    const svd_trt_status found = svd_trt_stream_open(pipeline, &picture, 1, &arguments, nullptr, &stream);
    CHECK(found == status);
    CHECK(stream == nullptr);
    std::string message = svd_trt_last_error();
    CHECK(!message.empty());
    CHECK(message.find('\n') == std::string::npos);
    return message;
  }
};

bool contains(const std::string &text, const std::string &part) { return text.find(part) != std::string::npos; }

} // namespace

TEST_CASE("null, closed and invented handles") {
  svd_trt_frame frame{};
  frame.size = sizeof frame;
  int64_t count = 0;
  const char *text = nullptr;
  int variable = 0;
  Open open;
  svd_trt_stream *closed_stream = nullptr;
  REQUIRE(svd_trt_stream_open(open.pipeline, &open.picture, 1, nullptr, nullptr, &closed_stream) == SVD_TRT_OK);
  REQUIRE(svd_trt_stream_close(closed_stream) == SVD_TRT_OK);
  svd_trt_pipeline *closed_pipeline = nullptr;
  REQUIRE(svd_trt_pipeline_open(bundle_path().c_str(), nullptr, &closed_pipeline) == SVD_TRT_OK);
  REQUIRE(svd_trt_pipeline_close(closed_pipeline) == SVD_TRT_OK);

  // A pipeline where a stream is wanted is refused too.
  for (svd_trt_stream *bad :
       {static_cast<svd_trt_stream *>(nullptr), closed_stream, reinterpret_cast<svd_trt_stream *>(&variable),
        reinterpret_cast<svd_trt_stream *>(open.pipeline)}) {
    CHECK(svd_trt_stream_next(bad, &frame) == SVD_TRT_HANDLE_ERROR);
    CHECK(std::string(svd_trt_last_error()) == "the stream is null or closed; open one with svd_trt_stream_open");
    CHECK(svd_trt_stream_cancel(bad) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_stream_close(bad) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_stream_videos(bad, &count) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_stream_settings(bad, &open.arguments) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_stream_latents(bad, nullptr, 0, reinterpret_cast<size_t *>(&count)) == SVD_TRT_HANDLE_ERROR);
  }
  for (svd_trt_pipeline *bad :
       {static_cast<svd_trt_pipeline *>(nullptr), closed_pipeline, reinterpret_cast<svd_trt_pipeline *>(&variable)}) {
    svd_trt_stream *stream = nullptr;
    CHECK(svd_trt_pipeline_close(bad) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_pipeline_cancel(bad) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_pipeline_release(bad) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_pipeline_manifest(bad, &text) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_pipeline_self_test(bad, nullptr, nullptr) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_arguments_init(bad, &open.arguments, sizeof open.arguments) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_stream_open(bad, &open.picture, 1, nullptr, nullptr, &stream) == SVD_TRT_HANDLE_ERROR);
    CHECK(contains(svd_trt_last_error(), "the pipeline is null or closed"));
  }
}

TEST_CASE("null pointers") {
  Open open;
  svd_trt_stream *stream = nullptr;
  svd_trt_pipeline *pipeline = nullptr;
  CHECK(svd_trt_pipeline_open(nullptr, nullptr, &pipeline) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_pipeline_open(bundle_path().c_str(), nullptr, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_open_options_init(nullptr, 0) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_arguments_init(open.pipeline, nullptr, 0) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_picture_init(nullptr, 0) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_stream_options_init(nullptr, 0) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_pipeline_manifest(open.pipeline, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_stream_open(open.pipeline, nullptr, 1, nullptr, nullptr, &stream) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_stream_open(open.pipeline, &open.picture, 0, nullptr, nullptr, &stream) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_stream_open(open.pipeline, &open.picture, 1, nullptr, nullptr, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_generate(open.pipeline, &open.picture, 1, nullptr, nullptr, nullptr, nullptr) ==
        SVD_TRT_ARGUMENT_ERROR);
  REQUIRE(svd_trt_stream_open(open.pipeline, &open.picture, 1, nullptr, nullptr, &stream) == SVD_TRT_OK);
  CHECK(svd_trt_stream_next(stream, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_stream_videos(stream, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_stream_settings(stream, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_stream_latents(stream, nullptr, 0, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_stream_close(stream) == SVD_TRT_OK);
}

TEST_CASE("structures of a wrong size") {
  Open open;
  svd_trt_stream *stream = nullptr;
  for (const size_t size :
       {size_t{0}, size_t{8}, size_t{144}, size_t{151}, sizeof(svd_trt_arguments) + 4, size_t{1} << 40}) {
    svd_trt_arguments arguments = open.arguments;
    arguments.size = size;
    CHECK(svd_trt_stream_open(open.pipeline, &open.picture, 1, &arguments, nullptr, &stream) == SVD_TRT_ARGUMENT_ERROR);
    CHECK(contains(svd_trt_last_error(), "call svd_trt_arguments_init first"));
    CHECK(svd_trt_arguments_init(open.pipeline, &arguments, size) == SVD_TRT_ARGUMENT_ERROR);
  }
  svd_trt_picture picture = open.picture;
  picture.size = 0;
  CHECK(svd_trt_stream_open(open.pipeline, &picture, 1, nullptr, nullptr, &stream) == SVD_TRT_ARGUMENT_ERROR);
  svd_trt_picture two[2] = {open.picture, open.picture};
  two[1].size = 8;
  CHECK(svd_trt_stream_open(open.pipeline, two, 2, nullptr, nullptr, &stream) == SVD_TRT_ARGUMENT_ERROR);
  two[0].size = sizeof(svd_trt_picture) + 1; // the second one would not be aligned
  CHECK(svd_trt_stream_open(open.pipeline, two, 2, nullptr, nullptr, &stream) == SVD_TRT_ARGUMENT_ERROR);
  REQUIRE(svd_trt_stream_open(open.pipeline, &open.picture, 1, nullptr, nullptr, &stream) == SVD_TRT_OK);
  svd_trt_frame frame{};
  CHECK(svd_trt_stream_next(stream, &frame) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_stream_close(stream) == SVD_TRT_OK);
}

TEST_CASE("arguments outside their limits") {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  const auto with = [](auto field, auto value) {
    Open open;
    open.arguments.*field = value;
    return open.refused(SVD_TRT_ARGUMENT_ERROR);
  };
  using A = svd_trt_arguments;
  CHECK(contains(with(&A::num_frames, 1), "num_frames 1 is outside what this bundle was built for (2 to "));
  CHECK(contains(with(&A::num_frames, 100000), "build one with another --frames"));
  CHECK(contains(with(&A::num_frames, std::numeric_limits<int64_t>::min()), "num_frames"));
  CHECK(with(&A::num_inference_steps, -1) == "num_inference_steps must be 1 to 1000, not -1");
  CHECK(with(&A::num_inference_steps, 1001) == "num_inference_steps must be 1 to 1000, not 1001");
  CHECK(with(&A::min_guidance_scale, nan) == "min_guidance_scale must be a number, not nan");
  CHECK(with(&A::max_guidance_scale, infinity) == "max_guidance_scale must be a number, not inf");
  CHECK(with(&A::max_guidance_scale, 101.0) == "max_guidance_scale must be -100 to 100, not 101");
  CHECK(with(&A::noise_aug_strength, -0.5) == "noise_aug_strength must be 0 to 100, not -0.5");
  CHECK(with(&A::fps, 0) == "fps must be 1 to 1000, not 0");
  CHECK(with(&A::motion_bucket_id, -1) == "motion_bucket_id must be 0 to 10000, not -1");
  CHECK(with(&A::num_videos_per_prompt, 0) == "num_videos_per_prompt must be 1 to 1000, not 0");
  CHECK(with(&A::decode_chunk_size, -1) == "decode_chunk_size must be at least 1, not -1");
  CHECK(with(&A::deep_every, -1) == "deep_every must be 1 to 1000, not -1");
  CHECK(with(&A::deep_every, 2) == "deep_every 2 needs a shallow denoiser, and this bundle has none; build one with "
                                   "--shallow-steps, or leave deep_every out");
  CHECK(contains(with(&A::height, 0), "height 0 is outside what this bundle was built for"));
  CHECK(contains(with(&A::width, 33), "width 33 is "));
  CHECK(with(&A::sampler, "dpm") == "sampler must be one of euler, unic, dpmpp-2m, ab2, lcm, not 'dpm'");
  CHECK(with(&A::schedule, "linear") == "schedule must be one of karras, exponential, ays, not 'linear'");
  CHECK(with(&A::quality, "ultra") == "quality must be one of best, standard, fast, draft, not 'ultra'");
  CHECK(with(&A::resize_mode, "zoom") == "resize_mode must be one of stretch, crop, pad, not 'zoom'");
  CHECK(contains(with(&A::background, "#12345"), "background must be black, white or a colour such as #ff8000"));
  const std::string long_text(100000, 'x');
  CHECK(with(&A::sampler, long_text.c_str()).size() < 200);
}

TEST_CASE("counts that are larger than the memory behind them are refused before it is read") {
  Open open;
  const double values[] = {700, 10, 0};
  open.arguments.sigmas = values, open.arguments.sigmas_count = size_t{1} << 40;
  CHECK(open.refused(SVD_TRT_ARGUMENT_ERROR) == "num_inference_steps must be 1 to 1000, not 1099511627775");
  open.arguments.sigmas_count = std::numeric_limits<size_t>::max();
  CHECK(contains(open.refused(SVD_TRT_ARGUMENT_ERROR), "num_inference_steps must be 1 to 1000"));
  open.arguments.sigmas = nullptr, open.arguments.sigmas_count = 0;
  const uint64_t seeds[] = {1, 2};
  open.arguments.seeds = seeds, open.arguments.seeds_count = size_t{1} << 40;
  CHECK(open.refused(SVD_TRT_ARGUMENT_ERROR) ==
        "1099511627776 seeds were given for 1 video; give one for each video, or one for all");
}

TEST_CASE("seeds that cannot be used") {
  Open open;
  const uint64_t seeds[] = {1, 2};
  open.arguments.seed = 42;
  CHECK(open.refused(SVD_TRT_ARGUMENT_ERROR) == "seed is 42, and has_seed is 0; set has_seed to 1");
  open.arguments.has_seed = 1, open.arguments.seeds = seeds, open.arguments.seeds_count = 1;
  CHECK(open.refused(SVD_TRT_ARGUMENT_ERROR) == "seed and seeds were both given; give one of them");
  open.arguments.seed = 0, open.arguments.has_seed = 0, open.arguments.seeds_count = 0;
  CHECK(open.refused(SVD_TRT_ARGUMENT_ERROR) == "seed is an empty list; give one seed, or one for each video");
  open.arguments.seeds = nullptr, open.arguments.seeds_count = 2;
  CHECK(open.refused(SVD_TRT_ARGUMENT_ERROR) == "seeds is null, and seeds_count is not 0");
  open.arguments.seeds = seeds, open.arguments.num_videos_per_prompt = 3;
  CHECK(open.refused(SVD_TRT_ARGUMENT_ERROR) ==
        "2 seeds were given for 3 videos; give one for each video, or one for all");
}

TEST_CASE("reserved fields that are not 0") {
  Open open;
  open.arguments.reserved = 1;
  CHECK(open.refused(SVD_TRT_ARGUMENT_ERROR) ==
        "reserved of a svd_trt_arguments is not 0; call svd_trt_arguments_init first");
  svd_trt_open_options options;
  REQUIRE(svd_trt_open_options_init(&options, sizeof options) == SVD_TRT_OK);
  options.reserved = 1;
  svd_trt_pipeline *pipeline = nullptr;
  CHECK(svd_trt_pipeline_open(bundle_path().c_str(), &options, &pipeline) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(contains(svd_trt_last_error(), "reserved of a svd_trt_open_options is not 0"));
}

TEST_CASE("sigmas that cannot be used") {
  Open open;
  const double values[] = {1, 2, 0}, not_a_number[] = {std::numeric_limits<double>::quiet_NaN(), 0};
  open.arguments.sigmas_count = 3;
  CHECK(open.refused(SVD_TRT_ARGUMENT_ERROR) == "sigmas is null, and sigmas_count is not 0");
  open.arguments.sigmas = values;
  CHECK(open.refused(SVD_TRT_ARGUMENT_ERROR) == "sigmas must decrease, and 1, 2, 0 do not");
  open.arguments.schedule = "ays";
  CHECK(open.refused(SVD_TRT_ARGUMENT_ERROR) == "schedule and sigmas were both given; give one of them");
  open.arguments.schedule = nullptr;
  open.arguments.sigmas_count = 0;
  CHECK(contains(open.refused(SVD_TRT_ARGUMENT_ERROR), "at least two numbers"));
  open.arguments.sigmas = not_a_number, open.arguments.sigmas_count = 2;
  CHECK(contains(open.refused(SVD_TRT_ARGUMENT_ERROR), "between 0 and 1e+06"));
}

TEST_CASE("guidance that cannot be used") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const auto with = [](double low, double high) {
    Open open;
    const double interval[] = {low, high};
    open.arguments.guidance_interval = interval;
    return open.refused(SVD_TRT_ARGUMENT_ERROR);
  };
  const std::string rule = "guidance_interval must be two noise levels from 0 to 1e+06, the lower one first, such as "
                           "0,50, not ";
  CHECK(with(50, 0) == rule + "50, 0");
  CHECK(with(5, 5) == rule + "5, 5");
  CHECK(with(-1, 5) == rule + "-1, 5");
  CHECK(with(nan, 5) == rule + "nan, 5");
  CHECK(with(0, nan) == rule + "0, nan");
  CHECK(contains(with(800, 900), "no step has a noise level above 800 and up to 900"));
  Open open;
  open.arguments.guidance_shape = "square";
  CHECK(open.refused(SVD_TRT_ARGUMENT_ERROR) ==
        "guidance_shape must be one of linear, constant, triangular, not 'square'");
}

TEST_CASE("pictures that cannot be used") {
  const auto with = [](auto field, auto value) {
    Open open;
    open.picture.*field = value;
    return open.refused(SVD_TRT_IMAGE_ERROR);
  };
  using P = svd_trt_picture;
  CHECK(with(&P::data, nullptr) == "a picture has no data");
  CHECK(with(&P::width, 0) == "a picture has the size 0x30; pass one that is not empty");
  CHECK(with(&P::height, -5) == "a picture has the size 40x-5; pass one that is not empty");
  CHECK(contains(with(&P::width, std::numeric_limits<int64_t>::max()), "too large"));
  CHECK(contains(with(&P::height, 1 << 20), "too large"));
  CHECK(with(&P::stride, 119) == "the stride of a picture is 119 bytes, and a row of 40 pixels has 120");
  CHECK(contains(with(&P::stride, -120), "the stride of a picture is -120"));
  for (const int64_t stride : {int64_t{1} << 62, std::numeric_limits<int64_t>::max(), (int64_t{1} << 30) + 1})
    CHECK(contains(with(&P::stride, stride), "bytes, and at most 1073741824 are taken"));
  Open open;
  svd_trt_stream *stream = nullptr;
  CHECK(svd_trt_stream_open(open.pipeline, &open.picture, size_t{1} << 60, nullptr, nullptr, &stream) ==
        SVD_TRT_ARGUMENT_ERROR);
}

TEST_CASE("bars that would make a picture too large are refused when the stream is opened") {
  Open open;
  const std::vector<uint8_t> column(65535 * 3);
  open.picture.data = column.data(), open.picture.width = 1, open.picture.height = 65535;
  open.arguments.resize_mode = "pad";
  const std::string message = open.refused(SVD_TRT_IMAGE_ERROR);
  CHECK(contains(message, "a picture of 1x65535 pixels would have "));
  CHECK(contains(message, " with bars; crop it"));
}

TEST_CASE("messages do not split characters of the caller's text") {
  Open open;
  const std::string text = std::string(59, 'x') + "\xc3\xa9\xc3\xa9\n";
  open.arguments.sampler = text.c_str();
  CHECK(contains(open.refused(SVD_TRT_ARGUMENT_ERROR), "not '" + std::string(59, 'x') + "...'"));
}

TEST_CASE("latents of a wrong size, frames on a device that is not there") {
  Open open;
  svd_trt_stream_options options;
  REQUIRE(svd_trt_stream_options_init(&options, sizeof options) == SVD_TRT_OK);
  svd_trt_stream *stream = nullptr;
  const float one = 1;
  options.latents_count = 1;
  CHECK(svd_trt_stream_open(open.pipeline, &open.picture, 1, nullptr, &options, &stream) == SVD_TRT_ARGUMENT_ERROR);
  options.latents = &one;
  CHECK(svd_trt_stream_open(open.pipeline, &open.picture, 1, nullptr, &options, &stream) == SVD_TRT_ARGUMENT_ERROR);
  options.latents_count = size_t{1} << 62; // must be refused before it is read
  CHECK(svd_trt_stream_open(open.pipeline, &open.picture, 1, nullptr, &options, &stream) == SVD_TRT_ARGUMENT_ERROR);
  options.latents = nullptr, options.latents_count = 0, options.frames_on_device = 1;
  CHECK(svd_trt_stream_open(open.pipeline, &open.picture, 1, nullptr, &options, &stream) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(contains(svd_trt_last_error(), "frames_on_device needs a GPU provider"));
}

TEST_CASE("providers that are not there") {
  const auto opened = [](const char *provider, const char *library, int32_t device, int32_t threads, void *stream) {
    svd_trt_open_options options;
    svd_trt_open_options_init(&options, sizeof options);
    options.provider = provider, options.provider_library = library, options.device = device, options.threads = threads;
    options.cuda_stream = stream;
    svd_trt_pipeline *pipeline = nullptr;
    const svd_trt_status status = svd_trt_pipeline_open(bundle_path().c_str(), &options, &pipeline);
    CHECK(pipeline == nullptr);
    return status;
  };
  int variable = 0;
  CHECK(opened("rocm", nullptr, 0, 0, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(opened("", nullptr, 0, 0, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(opened("cpu", nullptr, -1, 0, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(opened("cpu", nullptr, 0, -1, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(opened("cpu", nullptr, 0, 0, &variable) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(opened("cpu", "x.so", 0, 0, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(opened("tensorrt-rtx", nullptr, 0, 0, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(opened("tensorrt-rtx", "/nowhere.so", 0, 0, nullptr) == SVD_TRT_BACKEND_ERROR);
}
