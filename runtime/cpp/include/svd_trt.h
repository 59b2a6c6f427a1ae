/* C interface of svd-trt: pictures in, videos out, with a bundle that `svd-trt build` wrote.
 *
 * - Functions return a status. Their results go to pointers that the caller gives, and are unchanged after a failure.
 *   svd_trt_last_error() explains the last failure of the calling thread. No exception leaves a function.
 * - A handle is only a number in the shape of a pointer. A null, closed or invented handle is refused, never followed.
 * - Structures begin with `size`, the size that the caller was compiled with. Later versions only append fields, and
 *   zero means the behaviour of before. Call the structure's init function first; it sets `size` and the defaults.
 *   Fields `reserved` must be 0.
 * - All functions may be called from any thread. Calls for one stream wait for each other, except cancel and close.
 *   Streams of one pipeline may run at the same time.
 *
 * docs/embedding.md has examples; docs/bundle.md describes bundles.
 */
#ifndef SVD_TRT_H
#define SVD_TRT_H

#include <stddef.h>
#include <stdint.h>

#if defined(SVD_TRT_STATIC)
#define SVD_TRT_API
#elif defined(_WIN32)
#if defined(SVD_TRT_BUILDING)
#define SVD_TRT_API __declspec(dllexport)
#else
#define SVD_TRT_API __declspec(dllimport)
#endif
#else
#define SVD_TRT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Increases if a program that was compiled with an earlier version would no longer work. */
#define SVD_TRT_ABI_VERSION 1

typedef int32_t svd_trt_status;
enum {
  SVD_TRT_OK = 0,
  SVD_TRT_END = 1,              /* the stream has no more frames */
  SVD_TRT_CANCELLED = 2,        /* the stream was cancelled, by a call or by a callback */
  SVD_TRT_ARGUMENT_ERROR = -1,  /* a value is malformed, or outside what the bundle was built for */
  SVD_TRT_BUNDLE_ERROR = -2,    /* the bundle is missing, incomplete, altered, or of another schema */
  SVD_TRT_BACKEND_ERROR = -3,   /* ONNX Runtime or a provider failed, or cannot run the bundle */
  SVD_TRT_IMAGE_ERROR = -4,     /* a picture cannot be used */
  SVD_TRT_HANDLE_ERROR = -5,    /* a handle is null, closed, or of another kind */
  SVD_TRT_MEMORY_ERROR = -6,    /* the host has too little memory */
  SVD_TRT_SELF_TEST_ERROR = -7, /* a golden value does not hold here */
  SVD_TRT_INTERNAL_ERROR = -8   /* a defect of svd-trt */
};

typedef struct svd_trt_pipeline svd_trt_pipeline;
typedef struct svd_trt_stream svd_trt_stream;

/* SVD_TRT_ABI_VERSION of the library, and its version as text. */
SVD_TRT_API int32_t svd_trt_abi_version(void);
SVD_TRT_API const char *svd_trt_version(void);

/* One line about the last failure of the calling thread: what happened, then what to do. Valid until this thread's
 * next call of a function here; empty if there was no failure. */
SVD_TRT_API const char *svd_trt_last_error(void);

/* ---- pipelines -------------------------------------------------------------------------------------------------- */

typedef struct svd_trt_open_options {
  size_t size;
  const char *provider;         /* of ONNX Runtime: NULL or "cpu"; "cuda", "tensorrt", "tensorrt-rtx" */
  const char *provider_library; /* "tensorrt-rtx": file of the plugin with the provider */
  int32_t device;               /* index of the GPU */
  int32_t threads;              /* of the CPU for one network; 0: all that the process may use */
  int32_t verify;               /* compare all files with their hashes, which reads the whole bundle; default 1 */
  int32_t reserved;
  void *cuda_stream; /* a cudaStream_t that networks run on; NULL: one of ONNX Runtime's own */
} svd_trt_open_options;

SVD_TRT_API svd_trt_status svd_trt_open_options_init(svd_trt_open_options *options, size_t size);

/* Opens the folder `bundle` (UTF-8). Networks are loaded when they are first used. `options` may be NULL. */
SVD_TRT_API svd_trt_status svd_trt_pipeline_open(const char *bundle, const svd_trt_open_options *options,
                                                 svd_trt_pipeline **pipeline);

/* Cancels the pipeline's streams and frees the networks, at the latest when the streams have ended. */
SVD_TRT_API svd_trt_status svd_trt_pipeline_close(svd_trt_pipeline *pipeline);

/* Cancels every stream of the pipeline that exists now. From any thread. */
SVD_TRT_API svd_trt_status svd_trt_pipeline_cancel(svd_trt_pipeline *pipeline);

/* Frees networks that no stream is using; they are loaded again when they are needed. */
SVD_TRT_API svd_trt_status svd_trt_pipeline_release(svd_trt_pipeline *pipeline);

/* The text of manifest.json, which has limits, defaults and help of every argument under host.arguments. Valid until
 * the pipeline is closed. */
SVD_TRT_API svd_trt_status svd_trt_pipeline_manifest(svd_trt_pipeline *pipeline, const char **json);

/* ---- arguments of a generation ---------------------------------------------------------------------------------- */

/* The names, and what they mean, are those of Python. svd_trt_arguments_init sets the bundle's defaults. */
typedef struct svd_trt_arguments {
  size_t size;
  int64_t num_frames;
  int64_t num_inference_steps; /* 0: those of the quality, or the bundle's default; not used if there are sigmas */
  const double *sigmas;        /* noise levels to step through; NULL: those of the schedule */
  size_t sigmas_count;
  double min_guidance_scale;
  double max_guidance_scale;
  int64_t fps;
  int64_t motion_bucket_id;
  double noise_aug_strength;
  int64_t decode_chunk_size; /* 0: all frames of a video, or what the bundle takes */
  int64_t num_videos_per_prompt;
  uint64_t seed;
  int32_t has_seed; /* 0: a random seed; `seed` must then be 0 */
  int32_t reserved;
  int64_t height;
  int64_t width;
  const char *sampler;     /* "euler", "unic", "dpmpp-2m" or "ab2"; NULL: the bundle's default */
  const char *resize_mode; /* "stretch" (NULL), "crop" or "pad" */
  const char *background;  /* colour of the bars of "pad": "#rrggbb", "black" or "white"; NULL: black */
  /* ---- the first version ended here; new fields are only appended ---- */
  const char *guidance_shape;      /* "linear" (NULL), "constant" or "triangular" */
  const double *guidance_interval; /* two noise levels; only steps from levels between them have guidance; NULL: all */
  const char *schedule;            /* "karras", "exponential" or "ays" (Align Your Steps); NULL: the checkpoint's */
  const char *quality;             /* "best", "standard", "fast" or "draft": sets steps, schedule, sampler and
                                    * guidance_interval if they are not given; NULL: nothing */
  const uint64_t *seeds;           /* a seed for each video, instead of `seed`; NULL: one for all */
  size_t seeds_count;
  int64_t deep_every; /* steps from one with all levels of the UNet to the next; 0: 1, so all steps are such */
} svd_trt_arguments;

SVD_TRT_API svd_trt_status svd_trt_arguments_init(svd_trt_pipeline *pipeline, svd_trt_arguments *arguments,
                                                  size_t size);

/* Eight-bit RGB, row by row from the top. */
typedef struct svd_trt_picture {
  size_t size;
  const uint8_t *data;
  int64_t width;
  int64_t height;
  int64_t stride; /* bytes from the start of a row to the start of the next; 0: 3 * width */
} svd_trt_picture;

SVD_TRT_API svd_trt_status svd_trt_picture_init(svd_trt_picture *picture, size_t size);

/* ---- streams ---------------------------------------------------------------------------------------------------- */

/* `stage` is "encode" (pictures), "denoise" (steps) or "decode" (frames). Another result than 0 cancels the stream.
 * It is called in the thread that asks for frames, and must not call functions for the same stream, except
 * svd_trt_stream_cancel and svd_trt_stream_close. It is not called any more once the stream was cancelled or closed,
 * but a call that began before may go on in the thread that asked for frames: `user` must live until the call in that
 * thread has returned. */
typedef int32_t (*svd_trt_progress)(void *user, const char *stage, int64_t done, int64_t total);

typedef struct svd_trt_stream_options {
  size_t size;
  svd_trt_progress progress;
  void *user;               /* first argument of `progress` */
  const float *latents;     /* noise of unit variance to start from, [B, F, C, h, w]; NULL: the seed's */
  size_t latents_count;     /* number of floats */
  int32_t frames_on_device; /* leave frames in the memory of the GPU */
  int32_t reserved;
} svd_trt_stream_options;

SVD_TRT_API svd_trt_status svd_trt_stream_options_init(svd_trt_stream_options *options, size_t size);

/* One frame, eight-bit RGB. `data` is valid until the next call of svd_trt_stream_next for the stream, whatever that
 * returns and in whichever thread, or until the stream is closed. svd_trt_stream_cancel and svd_trt_pipeline_close
 * leave it valid. */
typedef struct svd_trt_frame {
  size_t size;
  const uint8_t *data; /* in the memory of the GPU if on_device is not 0 */
  int64_t width;
  int64_t height;
  int64_t stride; /* bytes from the start of a row to the start of the next */
  int64_t video;  /* index of the video, from 0 */
  int64_t index;  /* index of the frame in its video, from 0 */
  int32_t on_device;
  int32_t reserved;
} svd_trt_frame;

/* Checks every argument and copies the pictures; the work starts when the first frame is requested. `arguments` and
 * `options` may be NULL. Pictures are an array; the first one's `size` is the distance of all. */
SVD_TRT_API svd_trt_status svd_trt_stream_open(svd_trt_pipeline *pipeline, const svd_trt_picture *pictures,
                                               size_t count, const svd_trt_arguments *arguments,
                                               const svd_trt_stream_options *options, svd_trt_stream **stream);

/* Waits for the next frame: all of the first video, then of the next. Set frame->size first. Returns SVD_TRT_OK,
 * SVD_TRT_END, SVD_TRT_CANCELLED or an error. */
SVD_TRT_API svd_trt_status svd_trt_stream_next(svd_trt_stream *stream, svd_trt_frame *frame);

/* Instead of frames: denoises everything, and copies the latents [B, F, C, h, w], `count` floats. With data NULL, only
 * writes their number to *needed, which may be NULL otherwise. */
SVD_TRT_API svd_trt_status svd_trt_stream_latents(svd_trt_stream *stream, float *data, size_t count, size_t *needed);

/* What the videos are made with: every default decided, and the seed. Pointers in it are valid until the stream is
 * closed. Set settings->size first. */
SVD_TRT_API svd_trt_status svd_trt_stream_settings(svd_trt_stream *stream, svd_trt_arguments *settings);

/* Number of videos. */
SVD_TRT_API svd_trt_status svd_trt_stream_videos(svd_trt_stream *stream, int64_t *videos);

/* Ends the work of the stream as soon as possible; the call that waits for a frame returns SVD_TRT_CANCELLED. */
SVD_TRT_API svd_trt_status svd_trt_stream_cancel(svd_trt_stream *stream);

/* Cancels the stream and frees its memory, at the latest when the calls for it have returned. After SVD_TRT_END or an
 * error, a stream that is still open keeps only its settings. */
SVD_TRT_API svd_trt_status svd_trt_stream_close(svd_trt_stream *stream);

/* Opens a stream, hands out every frame, and closes it. Another result of `on_frame` than 0 cancels. */
typedef int32_t (*svd_trt_on_frame)(void *user, const svd_trt_frame *frame);
SVD_TRT_API svd_trt_status svd_trt_generate(svd_trt_pipeline *pipeline, const svd_trt_picture *pictures, size_t count,
                                            const svd_trt_arguments *arguments, const svd_trt_stream_options *options,
                                            svd_trt_on_frame on_frame, void *frame_user);

/* Compares what this library gets with the golden values of the bundle, and reports each comparison. Returns
 * SVD_TRT_SELF_TEST_ERROR if a difference is larger than allowed. `on_check` may be NULL. */
typedef void (*svd_trt_on_check)(void *user, const char *name, double difference, double allowed);
SVD_TRT_API svd_trt_status svd_trt_pipeline_self_test(svd_trt_pipeline *pipeline, svd_trt_on_check on_check,
                                                      void *user);

#ifdef __cplusplus
}
#endif
#endif
