// manifest.json as far as a host needs it. Names are those of docs/bundle.md.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace svd_trt::detail {

constexpr int64_t kSchema = 4;

struct Range {
  int64_t min, max;
  bool holds(int64_t value) const { return min <= value && value <= max; }
  std::string words() const {
    return min == max ? std::to_string(min) : std::to_string(min) + " to " + std::to_string(max);
  }
};

struct File {
  std::string path, sha256;
  uint64_t size;
};

// A number, or the value of a symbol divided by a number.
struct Axis {
  std::string symbol; // empty if it is a number
  int64_t number;
  bool operator==(const Axis &other) const { return symbol == other.symbol && number == other.number; }
};

enum class Type { float32, float16, uint8 };

struct Tensor {
  std::string name;
  Type type;
  std::vector<Axis> shape;
};

using Sizes = std::map<std::string, int64_t>; // a value for each symbol

// The shape with every symbol replaced by its value.
std::vector<int64_t> resolved(const std::vector<Axis> &shape, const Sizes &sizes);

struct Network {
  std::vector<Tensor> inputs, outputs;
  File graph;
};

struct Model {
  int64_t latent_channels, vae_scale_factor, embed_dim, image_size, decoder_channels;
  std::array<float, 3> image_mean, image_std;
};

struct Sampler {
  std::optional<double> sigma_min, sigma_max; // empty: of the levels of training that a run takes
  double rho;
  std::string timestep_spacing, schedule;
  std::optional<double> final_sigma; // empty: the last of the others again
  std::string solver;
  int64_t steps_offset;
  std::vector<double> training_sigmas; // the least first
};

struct Condition {
  std::string argument;
  double add;
};

struct Draw {
  std::string name;
  std::vector<Axis> shape;
  bool half;
};

struct Branch {
  bool conditioned;
  float constant, factor;
};

// A generation argument. Which limits there are depends on its kind.
struct Argument {
  std::string kind;
  std::optional<double> default_number, min, max;
  std::string default_text;
  std::vector<std::string> choices;
};

struct Manifest {
  Model model;
  Sampler sampler;
  std::map<std::string, Range> ranges;
  std::map<std::string, int64_t> multiples; // of symbols
  std::map<std::string, Network> networks;
  std::optional<int64_t> deep_channels; // of the features for shallow steps; empty: there is no shallow denoiser
  bool only_onnxruntime;                // the graphs have operators that other runtimes do not know
  std::vector<Condition> conditions;
  std::vector<Draw> draws;
  std::string initial_scale;
  std::string first_frame_scale, last_frame_scale; // arguments
  std::vector<Branch> branches;
  double guidance_off_up_to;
  std::string image_noise; // an argument
  std::map<std::string, Argument> arguments;
  std::vector<File> files; // all that the manifest names
  std::optional<File> golden_picture, golden_values, golden_frames;

  const Range &range(const std::string &symbol) const { return ranges.at(symbol); }
};

// Throws Failure (bundle): it is not JSON, of another schema, incomplete, or names algorithms that the library does
// not know; or `sha256`, if there is one, is not that of the text. `path` is the file, for messages.
Manifest parse_manifest(const std::string &text, const std::filesystem::path &path,
                        const std::optional<std::string> &sha256 = {});

} // namespace svd_trt::detail
