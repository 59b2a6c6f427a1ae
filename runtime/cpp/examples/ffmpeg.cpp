// svd-trt inside a program that encodes with FFmpeg's libraries: frames go from the pipeline to the encoder without a
// file or a pipe between them.
//
//   svd_trt_ffmpeg BUNDLE PICTURE.ppm VIDEO.mkv
//
// The video is FFV1, which is lossless, in a container that its name chooses, such as .mkv.
extern "C" {
#include <libavcodec/avcodec.h>
#include <libavformat/avformat.h>
#include <libavutil/opt.h>
}

#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>

#include "svd_trt.hpp"
#include "video_file.hpp"

namespace {

void check_av(int result, const char *what) {
  if (result >= 0) return;
  char text[AV_ERROR_MAX_STRING_SIZE];
  av_strerror(result, text, sizeof text);
  throw std::runtime_error(std::string(what) + ": " + text);
}

class Encoder {
public:
  Encoder(const char *path, const svd_trt::Settings &settings) {
    check_av(avformat_alloc_output_context2(&format_, nullptr, nullptr, path), path);
    const AVCodec *codec = avcodec_find_encoder(AV_CODEC_ID_FFV1);
    if (codec == nullptr) throw std::runtime_error("this FFmpeg has no FFV1 encoder");
    codec_ = avcodec_alloc_context3(codec);
    codec_->width = static_cast<int>(settings.width);
    codec_->height = static_cast<int>(settings.height);
    codec_->pix_fmt = AV_PIX_FMT_0RGB32;
    codec_->time_base = {1, static_cast<int>(settings.fps)};
    codec_->framerate = {static_cast<int>(settings.fps), 1};
    if (format_->oformat->flags & AVFMT_GLOBALHEADER) codec_->flags |= AV_CODEC_FLAG_GLOBAL_HEADER;
    check_av(avcodec_open2(codec_, codec, nullptr), "the encoder");
    stream_ = avformat_new_stream(format_, nullptr);
    stream_->time_base = codec_->time_base;
    check_av(avcodec_parameters_from_context(stream_->codecpar, codec_), "the stream");
    check_av(avio_open(&format_->pb, path, AVIO_FLAG_WRITE), path);
    check_av(avformat_write_header(format_, nullptr), path);
    frame_ = av_frame_alloc();
    packet_ = av_packet_alloc();
    frame_->format = codec_->pix_fmt;
    frame_->width = codec_->width;
    frame_->height = codec_->height;
    check_av(av_frame_get_buffer(frame_, 0), "a frame");
  }
  ~Encoder() {
    av_packet_free(&packet_);
    av_frame_free(&frame_);
    avcodec_free_context(&codec_);
    if (format_ != nullptr) avio_closep(&format_->pb);
    avformat_free_context(format_);
  }
  Encoder(const Encoder &) = delete;
  Encoder &operator=(const Encoder &) = delete;

  void write(const svd_trt::Frame &rgb) {
    check_av(av_frame_make_writable(frame_), "a frame");
    for (int64_t y = 0; y < rgb.height; ++y) { // three bytes become a word of 32 bits
      const uint8_t *from = rgb.data + y * rgb.stride;
      auto *to = reinterpret_cast<uint32_t *>(frame_->data[0] + y * frame_->linesize[0]);
      for (int64_t x = 0; x < rgb.width; ++x, from += 3)
        to[x] = uint32_t{from[0]} << 16 | uint32_t{from[1]} << 8 | from[2];
    }
    frame_->pts = next_++;
    encode(frame_);
  }

  void finish() {
    encode(nullptr);
    check_av(av_write_trailer(format_), "the end of the file");
  }

private:
  void encode(const AVFrame *frame) {
    check_av(avcodec_send_frame(codec_, frame), "the encoder");
    for (;;) {
      const int result = avcodec_receive_packet(codec_, packet_);
      if (result == AVERROR(EAGAIN) || result == AVERROR_EOF) return;
      check_av(result, "the encoder");
      av_packet_rescale_ts(packet_, codec_->time_base, stream_->time_base);
      packet_->stream_index = stream_->index;
      check_av(av_interleaved_write_frame(format_, packet_), "the file");
    }
  }

  AVFormatContext *format_ = nullptr;
  AVCodecContext *codec_ = nullptr;
  AVStream *stream_ = nullptr;
  AVFrame *frame_ = nullptr;
  AVPacket *packet_ = nullptr;
  int64_t next_ = 0;
};

} // namespace

int main(int argc, char **argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s BUNDLE PICTURE.ppm VIDEO.mkv\n", argv[0]);
    return 2;
  }
  try {
    const PpmPicture picture = read_ppm(argv[2]);
    svd_trt::Pipeline pipeline(argv[1]);
    svd_trt::Arguments arguments;
    arguments.seed = 42;
    svd_trt::Stream stream = pipeline.stream(picture.view(), arguments);
    Encoder encoder(argv[3], stream.settings());
    for (const svd_trt::Frame &frame : stream) encoder.write(frame);
    encoder.finish();
    return 0;
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
