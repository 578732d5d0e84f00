/* A CUDA driver without a GPU, as libcuda.so.1 under the real PyCUDA and cuda-bindings.

   Device memory is host memory, and work is done at once, or when the graph that recorded it is launched. What the
   driver's documentation forbids fails here with the documented code: calls without a current context or with one that
   is destroyed, legacy-stream work beside a blocking stream that captures, unsafe calls in a thread that captures.
   Every object is counted. The fake_... functions at the end are for the tests. */

#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum kind { STREAM, EVENT, GRAPH, EXECUTABLE, DEVICE_MEMORY, HOST_MEMORY, KINDS };

struct CUctx_st { int alive, sticky; };
typedef struct copy { void *to; const void *from; size_t size; struct copy *next; } copy;
typedef struct object {
    enum kind kind;
    CUcontext context;
    void *memory;
    size_t size;
    unsigned flags;
    int capturing, invalid; /* a stream */
    CUstreamCaptureMode mode;
    pthread_t thread;
    copy *work, **last; /* what a stream has captured, or a graph holds */
    struct object *next;
} object;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static object *objects;
static int alive[KINDS], made[KINDS], abandoned, references, releases_too_many, initialised;
static CUcontext primary;
static size_t device_limit = (size_t)-1, host_limit = (size_t)-1, held[KINDS];
static char failing[64];
static int failing_code, failing_after, last_wait_flags = -1, version = 13000;
static __thread CUcontext stack[64];
static __thread int depth;
static __thread CUstreamCaptureMode thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

static int is_sticky(int code) {
    return code == 214 || code == 220 || code == 700 || code == 702 || code == 710 || (714 <= code && code <= 719);
}

static CUresult check(const char *function) { /* the current context, and an error that a test has ordered */
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
    CUcontext context = stack[depth - 1];
    if (!context->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    if (context->sticky) return context->sticky;
    if (failing_code && !strcmp(failing, function) && failing_after-- <= 0) {
        int code = failing_code;
        failing_code = 0;
        if (is_sticky(code)) context->sticky = code;
        return code;
    }
    return CUDA_SUCCESS;
}

#define CALL(...) /* run the body with the lock held */                                                                \
    {                                                                                                                  \
        pthread_mutex_lock(&mutex);                                                                                    \
        CUresult code = check(__func__);                                                                               \
        if (!code) { __VA_ARGS__ }                                                                                     \
        pthread_mutex_unlock(&mutex);                                                                                  \
        return code;                                                                                                   \
    }

static CUresult unsafe(void) { /* what a capturing thread may not call */
    CUresult code = CUDA_SUCCESS;
    if (thread_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return code;
    for (object *o = objects; o; o = o->next)
        if (o->kind == STREAM && o->capturing && o->mode != CU_STREAM_CAPTURE_MODE_RELAXED &&
            (o->mode == CU_STREAM_CAPTURE_MODE_GLOBAL || pthread_equal(o->thread, pthread_self())))
            o->invalid = 1, code = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    return code;
}

static CUresult legacy(void) { /* the legacy stream waits for every blocking stream: not for one that captures */
    CUresult code = CUDA_SUCCESS;
    for (object *o = objects; o; o = o->next)
        if (o->kind == STREAM && o->capturing && !(o->flags & CU_STREAM_NON_BLOCKING))
            o->invalid = 1, code = CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    return code;
}

static object *create(enum kind kind, unsigned flags) {
    object *o = calloc(1, sizeof *o);
    *o = (object){.kind = kind, .flags = flags, .context = depth ? stack[depth - 1] : NULL, .next = objects};
    o->last = &o->work;
    alive[kind]++, made[kind]++;
    return objects = o;
}

static object *find(enum kind kind, const void *handle) {
    for (object *o = objects; o; o = o->next)
        if (o->kind == kind && (o == handle || (o->memory && o->memory == handle))) return o;
    return NULL;
}

static void destroy(object *o) {
    object **link = &objects;
    while (*link != o) link = &(*link)->next;
    *link = o->next;
    alive[o->kind]--, held[o->kind] -= o->size;
    for (copy *c = o->work, *next; c; c = next) next = c->next, free(c);
    free(o->memory);
    free(o);
}

static CUresult destroy_handle(enum kind kind, void *handle) {
    object *o = find(kind, handle);
    if (!o) return CUDA_ERROR_INVALID_HANDLE;
    destroy(o);
    return CUDA_SUCCESS;
}

static CUresult allocate(enum kind kind, size_t size, size_t limit, void **pointer) {
    CUresult code = unsafe();
    if (code) return code;
    if (!size) return CUDA_ERROR_INVALID_VALUE;
    if (size > limit - held[kind]) return CUDA_ERROR_OUT_OF_MEMORY;
    object *o = create(kind, 0);
    o->memory = *pointer = malloc(size);
    o->size = size, held[kind] += size;
    memset(o->memory, 0xCD, size);
    return CUDA_SUCCESS;
}

static CUresult submit(CUstream handle, void *to, const void *from, size_t size) {
    if (!handle) {
        CUresult code = legacy();
        if (!code) memmove(to, from, size);
        return code;
    }
    object *stream = find(STREAM, handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (!stream->capturing) return memmove(to, from, size), CUDA_SUCCESS;
    if (stream->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    copy *c = malloc(sizeof *c);
    *c = (copy){to, from, size, NULL};
    *stream->last = c, stream->last = &c->next;
    return CUDA_SUCCESS;
}

/* --- devices and contexts */

CUresult cuInit(unsigned flags) { return failing_code && !strcmp(failing, __func__) ? failing_code : (initialised = 1, CUDA_SUCCESS); }
CUresult cuDriverGetVersion(int *found) { return *found = version, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int number) {
    return *device = number, number ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult code, const char **text) {
    static __thread char line[32];
    const char *known = code == 2     ? "out of memory"
                        : code == 34  ? "CUDA driver is a stub library"
                        : code == 719 ? "unspecified launch failure"
                        : code == 803 ? "system has unsupported display driver / cuda driver combination"
                        : code == 804 ? "forward compatibility was attempted on non supported HW"
                                      : NULL;
    if (!known) strcpy(line, "error "), line[6] = '0' + code / 100, line[7] = '0' + code / 10 % 10, line[8] = '0' + code % 10, line[9] = 0;
    return *text = known ? known : line, CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult code, const char **text) { return cuGetErrorString(code, text); }

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    pthread_mutex_lock(&mutex);
    CUresult code = failing_code && !strcmp(failing, __func__) ? failing_code : CUDA_SUCCESS;
    if (code) failing_code = 0;
    else {
        if (!references++) primary = calloc(1, sizeof *primary), primary->alive = 1; /* never freed: stacks may name it */
        *context = primary;
    }
    pthread_mutex_unlock(&mutex);
    return code;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    pthread_mutex_lock(&mutex);
    CUresult code = CUDA_SUCCESS;
    if (!references) releases_too_many++, code = CUDA_ERROR_INVALID_CONTEXT;
    else if (!--references) { /* takes all that lives in it along; it stays on the stacks, as documented */
        primary->alive = 0;
        for (object *o = objects, *next; o; o = next) {
            next = o->next;
            if (o->context == primary) abandoned++, destroy(o);
        }
    }
    pthread_mutex_unlock(&mutex);
    return code;
}
CUresult cuCtxPushCurrent_v2(CUcontext context) {
    if (!context || !context->alive) return CUDA_ERROR_INVALID_CONTEXT;
    stack[depth++] = context;
    return CUDA_SUCCESS;
}
CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
    CUcontext top = stack[--depth];
    if (context) *context = top;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = depth ? stack[depth - 1] : NULL, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) CALL(*device = 0;)
CUresult cuCtxSynchronize(void) CALL(code = unsafe();)
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) {
    CUstreamCaptureMode previous = thread_mode;
    thread_mode = *mode, *mode = previous;
    return CUDA_SUCCESS;
}

/* --- memory */

CUresult cuMemGetInfo_v2(size_t *free, size_t *total) CALL(
    *total = device_limit; *free = device_limit - held[DEVICE_MEMORY];)
CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t size) CALL(
    code = allocate(DEVICE_MEMORY, size, device_limit, (void **)pointer);)
CUresult cuMemFree_v2(CUdeviceptr pointer) CALL(
    if (!(code = unsafe())) code = destroy_handle(DEVICE_MEMORY, (void *)pointer);)
CUresult cuMemHostAlloc(void **pointer, size_t size, unsigned flags) CALL(
    code = allocate(HOST_MEMORY, size, host_limit, pointer);)
CUresult cuMemFreeHost(void *pointer) CALL(if (!(code = unsafe())) code = destroy_handle(HOST_MEMORY, pointer);)
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, CUstream stream) CALL(
    code = submit(stream, (void *)to, from, size);)
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, CUstream stream) CALL(
    code = submit(stream, to, (void *)from, size);)
CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t size) CALL(
    code = submit(NULL, (void *)to, from, size);)
CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t size) CALL(code = submit(NULL, to, (void *)from, size);)

/* --- streams and events */

CUresult cuStreamCreate(CUstream *stream, unsigned flags) CALL(*stream = (CUstream)create(STREAM, flags);)
CUresult cuStreamDestroy_v2(CUstream stream) CALL(code = destroy_handle(STREAM, stream);)
static CUresult idle(CUstream handle) {
    object *stream = find(STREAM, handle);
    if (handle && !stream) return CUDA_ERROR_INVALID_HANDLE;
    if (!handle) return legacy();
    return stream->capturing ? stream->invalid = 1, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream stream) CALL(code = idle(stream);)
CUresult cuStreamQuery(CUstream stream) CALL(code = idle(stream);)
CUresult cuEventCreate(CUevent *event, unsigned flags) CALL(*event = (CUevent)create(EVENT, flags);)
CUresult cuEventDestroy_v2(CUevent event) CALL(code = destroy_handle(EVENT, event);)
CUresult cuEventRecord(CUevent event, CUstream stream) CALL(
    if (!find(EVENT, event) || (stream && !find(STREAM, stream))) code = CUDA_ERROR_INVALID_HANDLE;
    else if (!stream) code = legacy();)
CUresult cuEventSynchronize(CUevent event) CALL(
    object *o = find(EVENT, event); if (!o) code = CUDA_ERROR_INVALID_HANDLE; else last_wait_flags = o->flags;)
CUresult cuEventQuery(CUevent event) CALL(if (!find(EVENT, event)) code = CUDA_ERROR_INVALID_HANDLE;)

/* --- captures */

CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) CALL(
    object *stream = find(STREAM, handle);
    if (!stream) code = handle ? CUDA_ERROR_INVALID_HANDLE : CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    else if (stream->capturing) code = CUDA_ERROR_ILLEGAL_STATE;
    else stream->capturing = 1, stream->invalid = 0, stream->mode = mode, stream->thread = pthread_self();)
CUresult cuStreamEndCapture(CUstream handle, CUgraph *graph) CALL(
    object *stream = find(STREAM, handle);
    *graph = NULL;
    if (!stream) code = CUDA_ERROR_INVALID_HANDLE;
    else if (!stream->capturing) code = CUDA_ERROR_ILLEGAL_STATE;
    else if (stream->mode != CU_STREAM_CAPTURE_MODE_RELAXED && !pthread_equal(stream->thread, pthread_self()))
        code = CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    else {
        stream->capturing = 0;
        object *whole = create(GRAPH, 0);
        whole->context = NULL; /* a graph belongs to no context */
        whole->work = stream->work, stream->work = NULL, stream->last = &stream->work;
        if (stream->invalid) destroy(whole), code = CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        else *graph = (CUgraph)whole;
    })
CUresult cuGraphInstantiateWithFlags(CUgraphExec *executable, CUgraph handle, unsigned long long flags) CALL(
    object *graph = find(GRAPH, handle);
    if (!graph) code = CUDA_ERROR_INVALID_HANDLE;
    else {
        object *o = create(EXECUTABLE, 0);
        for (copy *c = graph->work; c; c = c->next) {
            copy *mine = malloc(sizeof *mine);
            *mine = *c, mine->next = NULL, *o->last = mine, o->last = &mine->next;
        }
        *executable = (CUgraphExec)o;
    })
CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream) CALL(
    object *o = find(EXECUTABLE, handle);
    if (!o) code = CUDA_ERROR_INVALID_HANDLE;
    else for (copy *c = o->work; c && !code; c = c->next) code = submit(stream, c->to, c->from, c->size);)
CUresult cuGraphDestroy(CUgraph graph) {
    pthread_mutex_lock(&mutex);
    CUresult code = destroy_handle(GRAPH, graph);
    pthread_mutex_unlock(&mutex);
    return code;
}
CUresult cuGraphExecDestroy(CUgraphExec executable) CALL(code = destroy_handle(EXECUTABLE, executable);)

/* --- how cuda-bindings finds all this */

CUresult cuGetProcAddress_v2(
    const char *symbol, void **function, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *status) {
    char name[128];
    *function = NULL;
    if (!strcmp(symbol, "cuGraphInstantiate")) symbol = "cuGraphInstantiateWithFlags";
    static void *self;
    if (!self) self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    for (int i = 0; i < 2 && !*function; i++) {
        strcat(strncpy(name, symbol, 100), i ? "" : "_v2");
        *function = dlsym(self, name);
    }
    if (status) *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
#undef cuGetProcAddress
CUresult cuGetProcAddress(const char *symbol, void **function, int version, cuuint64_t flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, NULL);
}

/* --- for the tests */

int fake_depth(void) { return depth; }                 /* of this thread's context stack */
int fake_references(void) { return references; }       /* to the primary context */
int fake_too_many(void) { return releases_too_many; }  /* releases without a reference */
int fake_abandoned(void) { return abandoned; }         /* objects that were alive when their context was destroyed */
int fake_alive(int kind) { return alive[kind]; }
int fake_made(int kind) { return made[kind]; }
int fake_wait_flags(void) { return last_wait_flags; }  /* of the event that was waited for last */
void fake_version(int wanted) { version = wanted; } /* of CUDA, as 1000 * major + 10 * minor */
void fake_limits(size_t device, size_t host) { device_limit = device, host_limit = host; }
void fake_fail(const char *function, int code, int after) { /* once, after so many calls of it */
    strncpy(failing, function, sizeof failing - 1), failing_after = after, failing_code = code;
}
