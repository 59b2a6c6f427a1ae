#include "video_file.hpp"

#include <cerrno>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace {

// BT.601, limited range: rows are Y, Cb and Cr. A y4m file has no place for the matrix, and readers take this one.
constexpr double kRed = 0.299, kBlue = 0.114, kGreen = 1 - kRed - kBlue;
constexpr double kToYuv[3][3] = {
    {kRed * 219 / 255, kGreen * 219 / 255, kBlue * 219 / 255},
    {-kRed / (2 * (1 - kBlue)) * 224 / 255, -kGreen / (2 * (1 - kBlue)) * 224 / 255, 0.5 * 224 / 255},
    {0.5 * 224 / 255, -kGreen / (2 * (1 - kRed)) * 224 / 255, -kBlue / (2 * (1 - kRed)) * 224 / 255}};

[[noreturn]] void fail(const std::string &what) { throw std::runtime_error(what + ": " + std::strerror(errno)); }

// The next number of a PPM's header; comments start with #.
int64_t header_number(std::FILE *file) {
  int c = std::getc(file);
  while (c == ' ' || c == '\t' || c == '\r' || c == '\n' || c == '#') {
    while (c == '#' || (c != '\n' && c != ' ' && c != '\t' && c != '\r' && c != EOF && (c < '0' || c > '9'))) {
      do c = std::getc(file);
      while (c != '\n' && c != EOF);
    }
    c = std::getc(file);
  }
  int64_t value = 0;
  for (; c >= '0' && c <= '9' && value < 100000; c = std::getc(file)) value = value * 10 + (c - '0');
  return value;
}

} // namespace

PpmPicture read_ppm(const std::string &path) {
  std::FILE *file = std::fopen(path.c_str(), "rb");
  if (file == nullptr) fail(path);
  char magic[2] = {0, 0};
  PpmPicture picture{0, 0, {}};
  bool whole = std::fread(magic, 1, 2, file) == 2 && magic[0] == 'P' && magic[1] == '6';
  if (whole) {
    picture.width = header_number(file), picture.height = header_number(file);
    whole = header_number(file) == 255 && picture.width > 0 && picture.height > 0 && picture.width <= 65535 &&
            picture.height <= 65535;
  }
  if (whole) {
    const auto row = static_cast<size_t>(picture.width * 3);
    for (int64_t y = 0; whole && y < picture.height; ++y) { // grows with the file, not with what its header claims
      picture.pixels.resize(picture.pixels.size() + row);
      whole = std::fread(&picture.pixels[static_cast<size_t>(y) * row], 1, row, file) == row;
    }
  }
  std::fclose(file);
  if (!whole)
    throw std::runtime_error(path + " is not a whole binary PPM of 8 bits; convert it: ffmpeg -i PICTURE picture.ppm");
  return picture;
}

VideoFile::VideoFile(std::string path, bool y4m, int64_t width, int64_t height, FrameRate rate)
    : path_(std::move(path)), partial_(path_ == "-" ? "" : path_ + ".part"), y4m_(y4m),
      file_(path_ == "-" ? stdout : std::fopen(partial_.c_str(), "wb")) {
  if (file_ == nullptr) fail(path_);
  if (!y4m_) return;
  const std::string header = "YUV4MPEG2 W" + std::to_string(width) + " H" + std::to_string(height) + " F" +
                             std::to_string(rate.numerator) + ":" + std::to_string(rate.denominator) +
                             " Ip A1:1 C444 XCOLORRANGE=LIMITED\n";
  put(header.data(), header.size());
}

VideoFile::~VideoFile() {
  if (file_ == nullptr || file_ == stdout) return;
  std::fclose(file_);
  std::remove(partial_.c_str());
}

void VideoFile::put(const void *data, size_t size) {
  if (std::fwrite(data, 1, size, file_) != size) fail(path_);
}

void VideoFile::write(const svd_trt::Frame &frame) {
  const auto width = static_cast<size_t>(frame.width), height = static_cast<size_t>(frame.height);
  if (!y4m_) {
    for (size_t y = 0; y < height; ++y) put(frame.data + y * static_cast<size_t>(frame.stride), width * 3);
    return;
  }
  planes_.resize(width * height * 3);
  for (size_t y = 0; y < height; ++y) {
    const uint8_t *row = frame.data + y * static_cast<size_t>(frame.stride);
    for (size_t x = 0; x < width; ++x)
      for (size_t plane = 0; plane < 3; ++plane) {
        const double value = kToYuv[plane][0] * row[3 * x] + kToYuv[plane][1] * row[3 * x + 1] +
                             kToYuv[plane][2] * row[3 * x + 2] + (plane == 0 ? 16 : 128);
        planes_[(plane * height + y) * width + x] = static_cast<uint8_t>(std::lround(value));
      }
  }
  put("FRAME\n", 6);
  put(planes_.data(), planes_.size());
}

void VideoFile::finish() {
  if (file_ == stdout) {
    if (std::fflush(stdout) != 0) fail("standard output");
    return;
  }
  std::FILE *file = file_;
  file_ = nullptr;
  if (std::fclose(file) != 0 || std::rename(partial_.c_str(), path_.c_str()) != 0) {
    std::remove(partial_.c_str());
    fail(path_);
  }
}
