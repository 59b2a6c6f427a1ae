// Parts of the library by themselves. Values that a bundle has (noise, schedule, pictures) are checked by the
// self-test.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <cmath>
#include <numeric>

#include "chunks.hpp"
#include "denoise.hpp"
#include "error.hpp"
#include "golden.hpp"
#include "handles.hpp"
#include "picture.hpp"
#include "resample.hpp"
#include "schedule.hpp"
#include "sha256.hpp"
#include "text.hpp"

using namespace svd_trt::detail;

TEST_CASE("sha256 of the standard's examples and of lengths around a block") {
  CHECK(sha256_of("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(sha256_of("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(sha256_of("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  CHECK(sha256_of(std::string(1000000, 'a')) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  for (const size_t length : {55, 56, 63, 64, 65, 119, 120, 128}) { // in pieces and as a whole
    const std::string text(length, 'x');
    Sha256 pieces;
    for (const char c : text) pieces.update(&c, 1);
    CHECK(pieces.hex() == sha256_of(text));
  }
}

TEST_CASE("values are rounded to float16 to the nearest and to even") {
  CHECK(rounded_to_half(1.0f) == 1.0f);
  CHECK(rounded_to_half(1.0f + 0x1p-11f) == 1.0f);               // halfway, down to even
  CHECK(rounded_to_half(1.0f + 3 * 0x1p-11f) == 1.0f + 0x1p-9f); // halfway, up to even
  CHECK(rounded_to_half(-0.1f) == -0.0999755859375f);
  CHECK(rounded_to_half(0x1p-25f) == 0.0f);
  CHECK(rounded_to_half(0x1.8p-25f) == 0x1p-24f); // subnormal
  CHECK(rounded_to_half(65519.0f) == 65504.0f);
  CHECK(std::isinf(rounded_to_half(65520.0f)));
}

TEST_CASE("noise depends on the low 32 bits of the seed, and draws continue one stream") {
  Generator small(42), large((uint64_t{1} << 40) + 42);
  CHECK(small.normal(100, false) == large.normal(100, false));
  Generator once(7), twice(7);
  const std::vector<float> whole = once.normal(64, false);
  std::vector<float> parts = twice.normal(32, false);
  const std::vector<float> rest = twice.normal(32, false);
  parts.insert(parts.end(), rest.begin(), rest.end());
  CHECK(whole == parts);
}

static Manifest with_chunk(int64_t least, int64_t most) {
  Manifest manifest{};
  manifest.ranges["chunk"] = {least, most};
  manifest.model.decoder_channels = 256;
  return manifest;
}

TEST_CASE("the default decode chunk is Python's") {
  // From svd_trt.engine.decode_chunks.chunk_choices.
  CHECK(default_chunk(with_chunk(1, 25), 14, 1, 576, 1024) == 14);
  CHECK(default_chunk(with_chunk(1, 25), 25, 1, 576, 1024) == 5);
  CHECK(default_chunk(with_chunk(1, 25), 25, 1, 64, 64) == 25);
  CHECK(default_chunk(with_chunk(1, 8), 13, 1, 64, 64) == 7);
  CHECK(default_chunk(with_chunk(4, 8), 9, 1, 64, 64) == 5);
  CHECK(default_chunk(with_chunk(3, 3), 4, 3, 64, 64) == 3);
}

TEST_CASE("chunks that the bundle does not take are refused") {
  CHECK(chunk_sizes(10, 4, {1, 4}) == std::vector<int64_t>{4, 4, 2});
  CHECK_THROWS_AS(chunk_sizes(10, 4, {3, 4}), Failure);
  CHECK_THROWS_AS(chunk_sizes(10, 5, {1, 4}), Failure);
}

TEST_CASE("sigmas are checked as in Python") {
  const double good[] = {700, 10, 0}, equal[] = {5, 5, 0}, negative[] = {5, -1}, large[] = {2e6, 1};
  const double not_a_number[] = {NAN, 1};
  CHECK(custom_sigmas(good, 3) == std::vector<float>{700, 10, 0});
  CHECK_THROWS_WITH(custom_sigmas(good, 1), "sigmas needs at least two numbers, such as 700, 10, 0");
  CHECK_THROWS_WITH(custom_sigmas(equal, 3), "sigmas must decrease, and 5, 5, 0 do not");
  for (const double *values : {negative, large, not_a_number})
    CHECK_THROWS_WITH(custom_sigmas(values, 2), "sigmas must be between 0 and 1e+06 and decrease");
}

TEST_CASE("the denoiser's coefficients of a step") {
  const std::vector<Row> table = step_table("euler", {2.0f, 1.0f, 0.0f});
  REQUIRE(table.size() == 2);
  CHECK(table[0][0] == doctest::Approx(1 / std::sqrt(5.0)));
  CHECK(table[0][1] == doctest::Approx(std::log(2.0) / 4));
  CHECK(table[0][2] == doctest::Approx(0.2));
  CHECK(table[0][3] == doctest::Approx(-2 / std::sqrt(5.0)));
  CHECK(table[0][4] == 0.5f);
  CHECK(table[1][5] == 1.0f);
}

TEST_CASE("DPM-Solver++ uses the step before, except in the first and the last step") {
  const std::vector<Row> table = step_table("dpmpp-2m", {8.0f, 4.0f, 1.0f, 0.0f}),
                         plain = step_table("euler", {8, 4, 1, 0});
  CHECK(table[0] == plain[0]);
  CHECK(table[1][5] == doctest::Approx(0.75 + 0.75 * 2 / 2)); // ln(4) / ln(2) is 2
  CHECK(table[1][6] == doctest::Approx(-0.75));
  CHECK(table[2] == plain[2]);
}

TEST_CASE("deep steps are the first, every nth, and those with other branches") {
  using Steps = std::vector<bool>;
  const bool D = true, s = false;
  CHECK(deep_steps(1, Steps(3, true)) == Steps{D, D, D});
  CHECK(deep_steps(3, Steps(8, true)) == Steps{D, s, s, D, s, s, D, s});
  CHECK(deep_steps(2, {false, true, true, true, true, false, false}) == Steps{D, D, s, D, s, D, s});
  CHECK(deep_steps(3, {false, false, true, true, true, true}) == Steps{D, s, D, s, s, D});
  CHECK(deep_steps(2, {}).empty());
}

TEST_CASE("few-step models take fresh noise in every step but the last") {
  const std::vector<float> sigmas = lcm_sigmas(4);
  const double known[] = {700, 128.56, 13.678, 0.49688, 0};
  for (size_t i = 0; i < 5; ++i) CHECK(sigmas.at(i) == doctest::Approx(known[i]).epsilon(1e-4));
  CHECK(noisy_steps("lcm", sigmas) == 3);
  CHECK(noisy_steps("euler", sigmas) == 0);
  const std::vector<Row> table = step_table("lcm", sigmas);
  CHECK(table[0][4] == 0.0f);
  CHECK(table[0][5] == 1.0f);
  CHECK(table[0][6] == sigmas[1]);
  CHECK(table[3][6] == 0.0f);
  CHECK_THROWS_WITH(
      lcm_sigmas(41),
      "num_inference_steps must be at most 40 with the sampler lcm, not 41; a few-step UNet needs 1 to 8");
}

TEST_CASE("noise levels of other schedules") {
  Sampler sampler{0.01, 100.0, 7, "leading", "exponential", 0.0, "euler", 0, {}};
  std::vector<float> sigmas = checkpoint_sigmas(sampler, 3);
  CHECK(sigmas[1] == doctest::Approx(1.0)); // the geometric mean
  CHECK(sigmas[3] == 0.0f);
  sampler.final_sigma.reset();
  CHECK(checkpoint_sigmas(sampler, 3)[3] == doctest::Approx(0.01));
  for (int i = 0; i < 10; ++i) sampler.training_sigmas.push_back(i + 1);
  sampler.schedule = "training";
  sampler.steps_offset = 1;
  CHECK(checkpoint_sigmas(sampler, 3) == std::vector<float>{8, 5, 2, 2});
  sampler.timestep_spacing = "trailing";
  CHECK(checkpoint_sigmas(sampler, 4) == std::vector<float>{10, 8, 5, 2, 2}); // 7.5 is rounded to 8, 2.5 to 2
  sampler.timestep_spacing = "linspace";
  CHECK(checkpoint_sigmas(sampler, 3) == std::vector<float>{10, 5.5, 1, 1});
  CHECK_THROWS_WITH(checkpoint_sigmas(sampler, 11),
                    "num_inference_steps must be at most 10, the levels of the checkpoint's noise schedule, not 11");
  sampler.schedule = "karras";
  sampler.sigma_min.reset();
  sampler.sigma_max.reset();
  sigmas = checkpoint_sigmas(sampler, 2);
  CHECK(sigmas[0] == doctest::Approx(10));
  CHECK(sigmas[1] == doctest::Approx(1));
}

TEST_CASE("messages are one line of UTF-8, whatever other libraries and callers write") {
  const auto line = [](const std::string &text, size_t room) {
    std::vector<char> to(room, 'x');
    write_line(text, to.data(), room);
    return std::string(to.data());
  };
  CHECK(line("one\ntwo\t\x7f\x1b[31m", 100) == "one?two???[31m");
  CHECK(line("\xc3\xa9\xe2\x82\xac\xf0\x9f\x9a\x80", 100) == "\xc3\xa9\xe2\x82\xac\xf0\x9f\x9a\x80");
  for (const char *bad : {"\xff", "\x80", "\xc3", "\xc0\x80", "\xe0\x80\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80"})
    CHECK(line(std::string("a") + bad + "b", 100).find_first_not_of("a?b") == std::string::npos);
  CHECK(line("a\xe2\x82\xac", 5) == "a\xe2\x82\xac");
  CHECK(line("a\xe2\x82\xac", 4) == "a"); // no half characters
  CHECK(line("abcdef", 4) == "abc");
  CHECK(echoed(std::string(59, 'x') + "\xc3\xa9") == "'" + std::string(59, 'x') + "...'");
  CHECK(echoed(std::string(60, 'x')) == "'" + std::string(60, 'x') + "'");
  CHECK(with_commas(999) == "999");
  CHECK(with_commas(1234567) == "1,234,567");
}

TEST_CASE("sizes that no memory could hold are refused, and do not overflow") {
  CHECK(elements({2, 3, 4}) == 24);
  CHECK(elements({}) == 1);
  CHECK(elements({0, int64_t{1} << 62}) == 0);
  CHECK_THROWS_AS(elements({int64_t{1} << 32, int64_t{1} << 32}), std::bad_alloc);
  CHECK_THROWS_AS(elements({-1}), std::bad_alloc);
}

TEST_CASE("several sources draw a row each, and go on with it") {
  std::vector<Generator> sources{Generator(1), Generator(2), Generator(3)};
  std::vector<float> wanted;
  Generator first(1), second(2);
  for (Generator *one : {&first, &second}) {
    const std::vector<float> row = one->normal(32, false);
    wanted.insert(wanted.end(), row.begin(), row.end());
  }
  CHECK(draw_rows(sources, 2, 32, false) == wanted);
  const std::vector<float> next = draw_rows(sources, 3, 32, false);
  CHECK(std::vector<float>(next.begin(), next.begin() + 32) == first.normal(32, false));
  CHECK(std::vector<float>(next.begin() + 64, next.end()) == Generator(3).normal(32, false));
  std::vector<Generator> one{Generator(7)};
  CHECK(draw_rows(one, 4, 16, false) == Generator(7).normal(64, false));
}

static Picture gradient(int64_t width, int64_t height) {
  Picture picture{width, height, std::vector<uint8_t>(static_cast<size_t>(width * height * 3))};
  for (size_t i = 0; i < picture.pixels.size(); ++i) picture.pixels[i] = static_cast<uint8_t>(i * 7 % 251);
  return picture;
}

TEST_CASE("weights of both filters sum to 1 for lengths from 1 on") {
  for (const int64_t length : {1, 2, 3, 5, 223, 224, 225, 1000, 5000})
    for (const Window<float> &window : blurred_cubic(length, 224)) {
      const double sum = std::accumulate(window.weights.begin(), window.weights.end(), 0.0);
      CHECK(sum == doctest::Approx(1.0).epsilon(1e-5));
      CHECK(window.start + static_cast<int64_t>(window.weights.size()) <= length);
    }
  // A constant stays constant, in every size.
  for (const int64_t size : {1, 8, 100}) {
    const std::vector<uint8_t> grey(40 * 30 * 3, 137);
    const std::vector<uint8_t> across = lanczos_across(grey, 30, 40, size);
    CHECK(lanczos_down(across, 30, size, size) == std::vector<uint8_t>(static_cast<size_t>(size * size * 3), 137));
  }
}

TEST_CASE("pictures are cropped and padded to the shape of the frames") {
  const Picture wide = gradient(40, 10);
  const Picture crop = framed(wide, 32, 32, ResizeMode::crop, {});
  CHECK(crop.width == 10);
  CHECK(crop.height == 10);
  CHECK(crop.pixels[0] == wide.pixels[15 * 3]);
  const Picture pad = framed(wide, 32, 32, ResizeMode::pad, {1, 2, 3});
  CHECK(pad.width == 40);
  CHECK(pad.height == 40);
  CHECK(pad.pixels[0] == 1);
  CHECK(pad.pixels[2] == 3);
  CHECK(pad.pixels[15 * 40 * 3] == wide.pixels[0]);
  CHECK(pad.pixels.back() == 3);
  const Picture same = framed(wide, 8, 32, ResizeMode::crop, {});
  CHECK(same.pixels == wide.pixels);
  CHECK(framed(wide, 32, 32, ResizeMode::stretch, {}).pixels == wide.pixels);
}

TEST_CASE("bars that would make a picture too large are refused before they are drawn") {
  CHECK_THROWS_WITH(
      check_framed({1, 65535}, 64, 128, ResizeMode::pad),
      "a picture of 1x65535 pixels would have 131070x65535 with bars; crop it, or use the resize_mode crop");
  CHECK_NOTHROW(check_framed({1, 65535}, 64, 128, ResizeMode::crop));
  CHECK_NOTHROW(check_framed({1, 65535}, 64, 128, ResizeMode::stretch));
}

TEST_CASE("rows of a picture may be apart") {
  const std::vector<uint8_t> rows{1, 2, 3, 4, 5, 6, 99, 99, 7, 8, 9, 10, 11, 12};
  const svd_trt_picture given{sizeof(svd_trt_picture), rows.data(), 2, 2, 8};
  CHECK(copy_picture(given).pixels == std::vector<uint8_t>{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12});
}

TEST_CASE("PPM files") {
  const Picture picture = read_ppm("P6\n# a comment\n2 1\n255\nabcdef");
  CHECK(picture.width == 2);
  CHECK(picture.pixels == std::vector<uint8_t>{'a', 'b', 'c', 'd', 'e', 'f'});
  for (const char *bad : {"", "P6", "P5\n2 1\n255\nabcdef", "P6\n2 1\n255\nabcde", "P6\n2 1\n65535\nabcdef",
                          "P6\n0 1\n255\n", "P6\n#", "P6\n99999999999999999999 1\n255\nabc"})
    CHECK_THROWS_AS(read_ppm(bad), Failure);
}

TEST_CASE("a manifest that is not one is a bundle error") {
  for (const char *bad : {"", "{", "[]", "3", "{}", R"({"schema_version": "4"})", R"({"schema_version": 4})",
                          R"({"schema_version": 4, "model": 5})"})
    CHECK_THROWS_AS(parse_manifest(bad, "b/manifest.json"), Failure);
  const std::string deep = R"({"schema_version": 4, "model": )" + std::string(1000000, '[') + std::string(1000000, ']');
  CHECK_THROWS_WITH(parse_manifest(deep + "}", "b/manifest.json"), "its JSON is nested more than 64 deep");
  CHECK_THROWS_WITH(parse_manifest(R"({"schema_version": 99})", "b/manifest.json"),
                    "b was written by a newer svd-trt (schema 99, this library reads 4); update the library");
  CHECK_THROWS_WITH(parse_manifest(R"({"schema_version": 1})", "b/manifest.json"),
                    "b was written by an older svd-trt (schema 1, this library reads 4); run `svd-trt build` again");
}

struct Thing {
  static constexpr uintptr_t handle_kind = 3;
};
struct ThingHandle;

TEST_CASE("handles are looked up and never used again") {
  Handles<Thing, ThingHandle> handles;
  ThingHandle *first = handles.add(std::make_shared<Thing>());
  CHECK(handles.find(first) != nullptr);
  CHECK(handles.remove(first) != nullptr);
  CHECK(handles.remove(first) == nullptr);
  ThingHandle *second = handles.add(std::make_shared<Thing>());
  CHECK(first != second);
  CHECK(handles.find(first) == nullptr);
  int variable = 0;
  CHECK(handles.find(reinterpret_cast<ThingHandle *>(&variable)) == nullptr);
  CHECK(handles.find(nullptr) == nullptr);
}
