// What the interfaces promise, beside the frames themselves, which tests/cpp compares with Python's.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bundle.hpp"

using namespace svd_trt;

TEST_CASE("the self-test passes") {
  Pipeline &pipeline = shared_pipeline();
  const std::vector<Check> checks = pipeline.self_test();
  CHECK(checks.size() >= 5);
  for (const Check &check : checks) CHECK_MESSAGE(check.passed(), check.name << ": " << check.difference);
}

TEST_CASE("frames come in order, with their places, and then the end") {
  Pipeline &pipeline = shared_pipeline();
  const TestPicture first = make_picture(50, 40), second = make_picture(31, 60);
  Arguments arguments = quick_arguments();
  arguments.num_videos_per_prompt = 2;
  arguments.decode_chunk_size = 2; // chunks run on over the ends of videos
  Stream stream = pipeline.stream({first.view(), second.view()}, arguments);
  CHECK(stream.videos() == 4);
  Frame frame{};
  for (int64_t i = 0; i < 12; ++i) {
    REQUIRE(stream.next(frame));
    CHECK(frame.video == i / 3);
    CHECK(frame.index == i % 3);
    CHECK(frame.stride == frame.width * 3);
    CHECK(frame.on_device == 0);
  }
  CHECK(!stream.next(frame));
  CHECK(!stream.next(frame));
}

TEST_CASE("the same seed gives the same frames, another seed others, no seed a random one") {
  Pipeline &pipeline = shared_pipeline();
  const TestPicture picture = make_picture(64, 64);
  Arguments arguments = quick_arguments();
  Stream one = pipeline.stream(picture.view(), arguments), again = pipeline.stream(picture.view(), arguments);
  arguments.seed = 43;
  Stream other = pipeline.stream(picture.view(), arguments);
  const std::vector<uint8_t> frames = all_frames(one);
  CHECK(frames == all_frames(again));
  CHECK(frames != all_frames(other));
  arguments.seed.reset();
  CHECK(pipeline.stream(picture.view(), arguments).settings().seeds !=
        pipeline.stream(picture.view(), arguments).settings().seeds);
}

TEST_CASE("settings have every default decided") {
  Pipeline &pipeline = shared_pipeline();
  const TestPicture picture = make_picture(64, 64);
  const Settings settings = pipeline.stream(picture.view()).settings();
  CHECK(settings.num_frames >= 2);
  CHECK(settings.num_inference_steps == 25);
  CHECK(settings.sigmas.size() == 26);
  CHECK(settings.min_guidance_scale == 1.0);
  CHECK(settings.max_guidance_scale == 3.0);
  CHECK(settings.fps == 7);
  CHECK(settings.motion_bucket_id == 127);
  CHECK(settings.noise_aug_strength == 0.02);
  CHECK(settings.height % 8 == 0);
  CHECK(settings.width % 8 == 0);
  CHECK(settings.decode_chunk_size >= 1);
  CHECK(settings.deep_every == 1);
  CHECK(settings.num_videos_per_prompt == 1);
  CHECK(settings.sampler == "euler");
  CHECK(settings.schedule.empty());
  CHECK(settings.quality.empty());
  CHECK(settings.resize_mode == "stretch");
  CHECK(settings.background == "#000000");
  CHECK(settings.seeds.size() == 1);
  CHECK(pipeline.manifest().find("\"schema_version\"") != std::string::npos);
}

TEST_CASE("guidance has a shape, and an interval of noise levels") {
  Pipeline &pipeline = shared_pipeline();
  const TestPicture picture = make_picture(64, 64);
  Arguments arguments = quick_arguments();
  const std::vector<float> before = pipeline.stream(picture.view(), arguments).latents();
  CHECK(pipeline.stream(picture.view(), arguments).settings().guidance_shape == "linear");
  CHECK(!pipeline.stream(picture.view(), arguments).settings().guidance_interval);
  arguments.guidance_interval = {0, 700}; // every step
  CHECK(pipeline.stream(picture.view(), arguments).latents() == before);
  arguments.guidance_interval = {0, 50};
  Stream part = pipeline.stream(picture.view(), arguments);
  CHECK(*part.settings().guidance_interval == std::array<double, 2>{0, 50});
  CHECK(part.latents() != before);
  arguments.guidance_interval.reset();
  arguments.guidance_shape = "constant";
  CHECK(pipeline.stream(picture.view(), arguments).settings().guidance_shape == "constant");
  CHECK(pipeline.stream(picture.view(), arguments).latents() != before);
}

TEST_CASE("a quality sets what is not given") {
  Pipeline &pipeline = shared_pipeline();
  const TestPicture picture = make_picture(64, 64);
  Arguments arguments;
  arguments.quality = "fast";
  Settings settings = pipeline.stream(picture.view(), arguments).settings();
  CHECK(settings.quality == "fast");
  CHECK(settings.schedule == "ays");
  CHECK(settings.sampler == "unic");
  CHECK(settings.num_inference_steps == 8);
  CHECK(settings.sigmas.size() == 9);
  CHECK(settings.guidance_interval == std::array<double, 2>{0, 50});
  arguments.num_inference_steps = 25;
  arguments.sampler = "dpmpp_2m";
  settings = pipeline.stream(picture.view(), arguments).settings();
  CHECK(settings.num_inference_steps == 25);
  CHECK(settings.sampler == "dpmpp-2m");
  CHECK(settings.schedule == "ays");
  arguments.num_inference_steps = 0;
  CHECK_THROWS_WITH(pipeline.stream(picture.view(), arguments), "num_inference_steps must be 1 to 1000, not 0");
}

TEST_CASE("sigmas of the caller are used") {
  Pipeline &pipeline = shared_pipeline();
  const TestPicture picture = make_picture(64, 64);
  Arguments arguments = quick_arguments();
  arguments.sigmas = std::vector<double>{700, 50, 5, 0};
  Stream stream = pipeline.stream(picture.view(), arguments);
  CHECK(stream.settings().num_inference_steps == 3);
  CHECK(stream.settings().sigmas == std::vector<double>{700, 50, 5, 0});
  CHECK(!all_frames(stream).empty());
}

TEST_CASE("latents: those that denoising ends with, and those that it starts from") {
  Pipeline &pipeline = shared_pipeline();
  const TestPicture picture = make_picture(64, 64);
  const Arguments arguments = quick_arguments();
  Stream stream = pipeline.stream(picture.view(), arguments);
  const std::vector<float> latents = stream.latents();
  const Settings settings = stream.settings();
  CHECK(latents.size() % static_cast<size_t>(3 * 4 * settings.height * settings.width / 64) == 0);
  CHECK(!all_frames(stream).empty()); // and the frames of these latents afterwards
  StreamOptions options;
  options.latents = std::vector<float>(latents.size(), 0.0f);
  CHECK(pipeline.stream(picture.view(), arguments, options).latents() != latents);
  options.latents.pop_back();
  CHECK_THROWS_AS(pipeline.stream(picture.view(), arguments, options), Error);
  options.latents.assign(latents.size(), NAN);
  CHECK_THROWS_WITH(pipeline.stream(picture.view(), arguments, options), "latents must be finite");
}

TEST_CASE("progress counts every stage to its end") {
  Pipeline &pipeline = shared_pipeline();
  const TestPicture picture = make_picture(64, 64);
  StreamOptions options;
  std::vector<std::string> seen;
  options.progress = [&](const std::string &stage, int64_t done, int64_t total) {
    seen.push_back(stage + " " + std::to_string(done) + "/" + std::to_string(total));
  };
  Arguments arguments = quick_arguments();
  arguments.decode_chunk_size = 2;
  Stream stream = pipeline.stream(picture.view(), arguments, options);
  CHECK(seen.empty()); // the work starts with the first frame
  all_frames(stream);
  CHECK(seen == std::vector<std::string>{"encode 0/1", "encode 1/1", "denoise 0/2", "denoise 1/2", "denoise 2/2",
                                         "decode 0/3", "decode 2/3", "decode 3/3"});
}

TEST_CASE("an exception of a callback comes out of the call, and ends the stream") {
  Pipeline &pipeline = shared_pipeline();
  const TestPicture picture = make_picture(64, 64);
  StreamOptions options;
  options.progress = [](const std::string &stage, int64_t done, int64_t) {
    if (stage == "denoise" && done == 1) throw std::out_of_range("enough");
  };
  Stream stream = pipeline.stream(picture.view(), quick_arguments(), options);
  Frame frame{};
  CHECK_THROWS_AS(stream.next(frame), std::out_of_range);
  CHECK_THROWS_AS(stream.next(frame), Cancelled);
}

TEST_CASE("a callback may not use its own stream, and may use the pipeline") {
  Pipeline &pipeline = shared_pipeline();
  const TestPicture picture = make_picture(64, 64);
  StreamOptions options;
  Stream *own = nullptr;
  std::string refusal;
  size_t inner = 0;
  options.progress = [&](const std::string &stage, int64_t done, int64_t) {
    if (stage != "denoise" || done != 1) return;
    Frame frame{};
    try {
      own->next(frame);
    } catch (const Error &error) {
      refusal = error.what();
    }
    Stream other = pipeline.stream(picture.view(), quick_arguments());
    inner = all_frames(other).size();
  };
  Stream stream = pipeline.stream(picture.view(), quick_arguments(), options);
  own = &stream;
  CHECK(all_frames(stream).size() == inner);
  CHECK(refusal == "a callback cannot use the stream that calls it; it may cancel or close it");
}

static int32_t count_frames(void *user, const svd_trt_frame *frame) {
  auto *count = static_cast<int *>(user);
  return ++*count == 2 && frame->width == 1 ? 1 : 0;
}
static int32_t stop_at_two(void *user, const svd_trt_frame *) { return ++*static_cast<int *>(user) == 2; }

TEST_CASE("svd_trt_generate hands out frames, and stops if the callback says so") {
  svd_trt_pipeline *pipeline = nullptr;
  REQUIRE(svd_trt_pipeline_open(bundle_path().c_str(), nullptr, &pipeline) == SVD_TRT_OK);
  const TestPicture test = make_picture(64, 64);
  const svd_trt_picture picture{sizeof picture, test.pixels.data(), test.width, test.height, 0};
  svd_trt_arguments arguments;
  REQUIRE(svd_trt_arguments_init(pipeline, &arguments, sizeof arguments) == SVD_TRT_OK);
  arguments.num_frames = 3, arguments.num_inference_steps = 1;
  int count = 0;
  CHECK(svd_trt_generate(pipeline, &picture, 1, &arguments, nullptr, count_frames, &count) == SVD_TRT_OK);
  CHECK(count == 3);
  count = 0;
  CHECK(svd_trt_generate(pipeline, &picture, 1, &arguments, nullptr, stop_at_two, &count) == SVD_TRT_CANCELLED);
  CHECK(count == 2);
  CHECK(std::string(svd_trt_last_error()) == "the frame callback cancelled the stream");
  CHECK(svd_trt_pipeline_close(pipeline) == SVD_TRT_OK);
}

TEST_CASE("a program that was compiled with a longer structure works if it uses nothing new") {
  svd_trt_pipeline *pipeline = nullptr;
  struct {
    svd_trt_open_options known;
    int64_t newer;
  } options;
  REQUIRE(svd_trt_open_options_init(&options.known, sizeof options) == SVD_TRT_OK);
  CHECK(options.newer == 0);
  CHECK(options.known.size == sizeof options);
  CHECK(svd_trt_pipeline_open(bundle_path().c_str(), &options.known, &pipeline) == SVD_TRT_OK);
  CHECK(svd_trt_pipeline_close(pipeline) == SVD_TRT_OK);
  options.newer = 1;
  CHECK(svd_trt_pipeline_open(bundle_path().c_str(), &options.known, &pipeline) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(std::string(svd_trt_last_error()).find("does not have; update it") != std::string::npos);
}

TEST_CASE("a program that was compiled with the first, shorter structure works") {
  constexpr size_t first_size = 152;
  REQUIRE(sizeof(svd_trt_arguments) > first_size);
  svd_trt_pipeline *pipeline = nullptr;
  REQUIRE(svd_trt_pipeline_open(bundle_path().c_str(), nullptr, &pipeline) == SVD_TRT_OK);
  svd_trt_arguments arguments;
  std::memset(&arguments, 0x55, sizeof arguments); // what is behind an old program's structure
  REQUIRE(svd_trt_arguments_init(pipeline, &arguments, first_size) == SVD_TRT_OK);
  const auto *bytes = reinterpret_cast<const unsigned char *>(&arguments);
  CHECK(std::all_of(bytes + first_size, bytes + sizeof arguments, [](unsigned char b) { return b == 0x55; }));
  arguments.num_frames = 3, arguments.num_inference_steps = 1;
  const TestPicture test = make_picture(64, 64);
  const svd_trt_picture picture{sizeof picture, test.pixels.data(), test.width, test.height, 0};
  svd_trt_stream *stream = nullptr;
  CHECK(svd_trt_stream_open(pipeline, &picture, 1, &arguments, nullptr, &stream) == SVD_TRT_OK);
  CHECK(svd_trt_stream_settings(stream, &arguments) == SVD_TRT_OK);
  CHECK(arguments.has_seed == 1);
  CHECK(std::all_of(bytes + first_size, bytes + sizeof arguments, [](unsigned char b) { return b == 0x55; }));
  CHECK(svd_trt_stream_close(stream) == SVD_TRT_OK);
  CHECK(svd_trt_pipeline_close(pipeline) == SVD_TRT_OK);
}

TEST_CASE("a seed for each video gives the videos that each seed gives alone") {
  Pipeline &pipeline = shared_pipeline();
  const TestPicture picture = make_picture(64, 64);
  Arguments arguments = quick_arguments();
  std::vector<uint8_t> one_by_one;
  for (const uint64_t seed : {uint64_t{7}, uint64_t{1} << 40}) {
    arguments.seed = seed;
    Stream stream = pipeline.stream(picture.view(), arguments);
    const std::vector<uint8_t> frames = all_frames(stream);
    one_by_one.insert(one_by_one.end(), frames.begin(), frames.end());
  }
  arguments.seed.reset();
  arguments.seeds = std::vector<uint64_t>{7, uint64_t{1} << 40};
  Stream stream = pipeline.stream({picture.view(), picture.view()}, arguments);
  CHECK(stream.settings().seeds == *arguments.seeds);
  CHECK(all_frames(stream) == one_by_one);
  arguments.seeds = std::vector<uint64_t>{};
  CHECK_THROWS_WITH(pipeline.stream(picture.view(), arguments),
                    "seed is an empty list; give one seed, or one for each video");
}

TEST_CASE("networks are released and loaded again") {
  Pipeline &pipeline = shared_pipeline();
  const TestPicture picture = make_picture(64, 64);
  Stream before = pipeline.stream(picture.view(), quick_arguments());
  const std::vector<uint8_t> frames = all_frames(before);
  Stream open = pipeline.stream(picture.view(), quick_arguments());
  Frame frame{};
  REQUIRE(open.next(frame));
  pipeline.release();
  while (open.next(frame)) {
  }
  Stream after = pipeline.stream(picture.view(), quick_arguments());
  CHECK(all_frames(after) == frames);
}

TEST_CASE("versions") {
  CHECK(svd_trt_abi_version() == SVD_TRT_ABI_VERSION);
  CHECK(std::strlen(svd_trt_version()) > 0);
}
