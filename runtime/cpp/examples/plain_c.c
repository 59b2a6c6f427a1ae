/* svd-trt in plain C: makes a video of a gradient and writes its frames as PPM files.
 *
 *   svd_trt_plain_c BUNDLE FOLDER
 */
#include <stdio.h>
#include <stdlib.h>

#include "svd_trt.h"

static int failed(const char *what) {
  fprintf(stderr, "%s: %s\n", what, svd_trt_last_error());
  return 1;
}

static int32_t show(void *user, const char *stage, int64_t done, int64_t total) {
  (void)user;
  fprintf(stderr, "%s %lld/%lld\n", stage, (long long)done, (long long)total);
  return 0; /* another number would cancel */
}

static int write_frame(const char *folder, const svd_trt_frame *frame) {
  char path[4096];
  snprintf(path, sizeof path, "%s/frame-%03lld.ppm", folder, (long long)frame->index);
  FILE *file = fopen(path, "wb");
  if (file == NULL) return 0;
  fprintf(file, "P6\n%lld %lld\n255\n", (long long)frame->width, (long long)frame->height);
  for (int64_t y = 0; y < frame->height; ++y)
    fwrite(frame->data + y * frame->stride, 1, (size_t)frame->width * 3, file);
  return fclose(file) == 0;
}

int main(int argc, char **argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: %s BUNDLE FOLDER\n", argv[0]);
    return 2;
  }
  svd_trt_pipeline *pipeline = NULL;
  if (svd_trt_pipeline_open(argv[1], NULL, &pipeline) != SVD_TRT_OK) return failed(argv[1]);

  enum { WIDTH = 320, HEIGHT = 180 };
  static uint8_t pixels[HEIGHT][WIDTH][3];
  for (int y = 0; y < HEIGHT; ++y)
    for (int x = 0; x < WIDTH; ++x) {
      pixels[y][x][0] = (uint8_t)(x * 255 / WIDTH);
      pixels[y][x][1] = (uint8_t)(y * 255 / HEIGHT);
      pixels[y][x][2] = 128;
    }
  svd_trt_picture picture;
  svd_trt_picture_init(&picture, sizeof picture);
  picture.data = &pixels[0][0][0];
  picture.width = WIDTH;
  picture.height = HEIGHT;

  svd_trt_arguments arguments;
  svd_trt_arguments_init(pipeline, &arguments, sizeof arguments);
  arguments.seed = 42;
  arguments.has_seed = 1;
  arguments.num_inference_steps = 2;

  svd_trt_stream_options options;
  svd_trt_stream_options_init(&options, sizeof options);
  options.progress = show;

  svd_trt_stream *stream = NULL;
  if (svd_trt_stream_open(pipeline, &picture, 1, &arguments, &options, &stream) != SVD_TRT_OK)
    return failed("svd_trt_stream_open");
  svd_trt_frame frame;
  frame.size = sizeof frame;
  svd_trt_status status;
  while ((status = svd_trt_stream_next(stream, &frame)) == SVD_TRT_OK) {
    if (!write_frame(argv[2], &frame)) {
      fprintf(stderr, "cannot write to %s\n", argv[2]);
      return 1;
    }
  }
  if (status != SVD_TRT_END) return failed("svd_trt_stream_next");
  svd_trt_stream_close(stream);
  svd_trt_pipeline_close(pipeline);
  return 0;
}
