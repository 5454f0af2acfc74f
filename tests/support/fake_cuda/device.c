/* The fake driver: devices, contexts, errors on demand. See README.md in this folder. */
#define _GNU_SOURCE
#include "state.h"
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

Device devices[MAX_DEVICES];
int num_devices;
size_t device_bytes;
__thread CUcontext current_context;
static pid_t owner;  /* the process that called cuInit; 0: none has */
static int mps_socket = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* FAKE_CUDA_ERRORS=cuMemMap:2,cuMemCreate@3:1 fails every cuMemMap, and the third cuMemCreate of the process. */
static CUresult error_on_demand(const char *function, int call) {
    char text[1024], *rest = text, *item;
    snprintf(text, sizeof text, "%s", getenv("FAKE_CUDA_ERRORS") ? getenv("FAKE_CUDA_ERRORS") : "");
    while ((item = strsep(&rest, ","))) {
        char *code = strchr(item, ':'), *number = strchr(item, '@');
        if (!code) continue;
        *code = 0;
        if (number) *number = 0;
        if (!strcmp(item, function) && (!number || atoi(number + 1) == call)) return atoi(code + 1);
    }
    return CUDA_SUCCESS;
}

static void log_call(const char *function) {
    const char *path = getenv("FAKE_CUDA_LOG");
    int fd = path ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    if (fd < 0) return;
    dprintf(fd, "%d %s\n", getpid(), function);
    close(fd);
}

static int is_terminated_by_mps(void);

CUresult enter(const char *function, int *num_calls, int needs_init) {
    pthread_mutex_lock(&lock);
    log_call(function);
    CUresult error = error_on_demand(function, ++*num_calls);
    if (error) return error;
    if (!needs_init) return CUDA_SUCCESS;
    if (owner != getpid()) return CUDA_ERROR_NOT_INITIALIZED;
    return is_terminated_by_mps() ? CUDA_ERROR_MPS_CLIENT_TERMINATED : CUDA_SUCCESS;
}

void unlock(int *unused) {
    (void)unused;
    pthread_mutex_unlock(&lock);
}

int current_device(void) {
    int index = (int)(intptr_t)current_context - 1;
    return index >= 0 && index < num_devices && devices[index].num_retained ? index : -1;
}

/* Becomes a client of the MPS daemon that listens in the pipe directory; as with the real driver, without a daemon the
 * process runs unlimited. The connection stays open: its end is the end of the client for the daemon. */
static CUresult connect_to_mps(void) {
    const char *directory = getenv("CUDA_MPS_PIPE_DIRECTORY");
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char answer[32] = "";
    if (!directory) return CUDA_SUCCESS;
    snprintf(address.sun_path, sizeof address.sun_path, "%s/control", directory);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd, (struct sockaddr *)&address, sizeof address)) {
        close(fd);
        return CUDA_SUCCESS;
    }
    dprintf(fd, "client %d\n", getpid());
    if (recv(fd, answer, strlen("connected\n"), MSG_WAITALL) <= 0 || strcmp(answer, "connected\n")) {
        close(fd);
        return CUDA_ERROR_MPS_SERVER_NOT_READY;
    }
    mps_socket = fd;
    return CUDA_SUCCESS;
}

static int is_terminated_by_mps(void) {
    char message[32] = "";
    return mps_socket >= 0 && recv(mps_socket, message, sizeof message - 1, MSG_DONTWAIT | MSG_PEEK) > 0
        && !strncmp(message, "terminated", strlen("terminated"));
}

int num_sms(void) {
    const char *share = getenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE");
    int sms = getenv("FAKE_CUDA_SMS") ? atoi(getenv("FAKE_CUDA_SMS")) : 132;
    return share && mps_socket >= 0 ? (int)(sms * atof(share) / 100) & ~1 : sms;
}

static void parse_uuid(const char *text, CUuuid *uuid) {
    unsigned byte;
    int index = 0;
    for (text += 4; *text && index < 16; text++) {
        if (*text == '-') continue;
        if (sscanf(text++, "%2x", &byte) != 1) break;
        uuid->bytes[index++] = (char)byte;
    }
}

/* True if `name` of CUDA_VISIBLE_DEVICES, an index or the beginning of a UUID, is this device. */
static int names(const char *name, int index, const char *uuid) {
    if (!strncmp(name, "GPU-", 4)) return !strncasecmp(name, uuid, strlen(name));
    return *name >= '0' && *name <= '9' && atoi(name) == index;
}

/* FAKE_CUDA_UUIDS lists the machine's devices; CUDA_VISIBLE_DEVICES selects and orders them, and ends at the first
 * name that is not one of them. */
static void find_devices(void) {
    char all[1024], visible[1024], *rest = all, *item, *uuids[MAX_DEVICES];
    const char *listed = getenv("FAKE_CUDA_UUIDS"), *chosen = getenv("CUDA_VISIBLE_DEVICES");
    int count = 0;
    snprintf(all, sizeof all, "%s", listed ? listed : "GPU-fa4ecada-0000-4000-8000-000000000000");
    while (count < MAX_DEVICES && (item = strsep(&rest, ","))) uuids[count++] = item;
    num_devices = 0;
    if (!chosen) {
        for (int i = 0; i < count; i++) parse_uuid(uuids[i], &devices[num_devices++].uuid);
        return;
    }
    snprintf(visible, sizeof visible, "%s", chosen);
    for (rest = visible; (item = strsep(&rest, ","));) {
        int found = 0;
        while (found < count && !names(item, found, uuids[found])) found++;
        if (found == count || num_devices == MAX_DEVICES) return;
        parse_uuid(uuids[found], &devices[num_devices++].uuid);
    }
}

CUresult cuInit(unsigned flags) {
    ENTRY_(0);
    REQUIRE(flags == 0, CUDA_ERROR_INVALID_VALUE);
    if (owner == getpid()) return CUDA_SUCCESS;
    REQUIRE(!owner, CUDA_ERROR_NOT_INITIALIZED); /* a driver that was used before fork() is lost to the child */
    find_devices();
    REQUIRE(num_devices, CUDA_ERROR_NO_DEVICE);
    device_bytes = getenv("FAKE_CUDA_BYTES") ? strtoull(getenv("FAKE_CUDA_BYTES"), NULL, 10) : 4ul << 30;
    CUresult error = connect_to_mps();
    if (!error) owner = getpid();
    return error;
}

CUresult cuDriverGetVersion(int *version) {
    ENTRY_(0);
    *version = 13000;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
    ENTRY;
    *count = num_devices;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    ENTRY;
    REQUIRE_DEVICE(ordinal);
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int len, CUdevice device) {
    ENTRY;
    REQUIRE_DEVICE(device);
    snprintf(name, (size_t)len, "fake device %d", device);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    ENTRY;
    REQUIRE_DEVICE(device);
    *uuid = devices[device].uuid;
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    ENTRY;
    REQUIRE_DEVICE(device);
    *bytes = device_bytes;
    return CUDA_SUCCESS;
}

/* The attributes of an H100 or H200; FAKE_CUDA_ATTRIBUTES=103=0,102=0 replaces some. */
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    ENTRY;
    REQUIRE_DEVICE(device);
    const int known[][2] = {{16, num_sms()}, {75, 9}, {76, 0}, {99, 1}, {102, 1}, {103, 1}, {133, mps_socket >= 0}};
    char text[256], *rest = text, *item;
    snprintf(text, sizeof text, "%s", getenv("FAKE_CUDA_ATTRIBUTES") ? getenv("FAKE_CUDA_ATTRIBUTES") : "");
    while ((item = strsep(&rest, ",")))
        if (atoi(item) == (int)attribute && strchr(item, '=')) {
            *value = atoi(strchr(item, '=') + 1);
            return CUDA_SUCCESS;
        }
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i][0] == (int)attribute) {
            *value = known[i][1];
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    ENTRY;
    REQUIRE_DEVICE(device);
    devices[device].num_retained++;
    *context = (CUcontext)(intptr_t)(device + 1);
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    ENTRY;
    REQUIRE_DEVICE(device);
    REQUIRE(devices[device].num_retained, CUDA_ERROR_INVALID_CONTEXT);
    devices[device].num_retained--;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    ENTRY;
    int index = (int)(intptr_t)context - 1;
    REQUIRE(!context || (index >= 0 && index < num_devices && devices[index].num_retained), CUDA_ERROR_INVALID_CONTEXT);
    current_context = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    ENTRY;
    *context = current_context;
    return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize(void) {
    ENTRY;
    return current_device() < 0 ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}

static const struct { int code; const char *name; } error_names[] = {
    {0, "CUDA_SUCCESS"}, {1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"},
    {3, "CUDA_ERROR_NOT_INITIALIZED"}, {100, "CUDA_ERROR_NO_DEVICE"}, {101, "CUDA_ERROR_INVALID_DEVICE"},
    {201, "CUDA_ERROR_INVALID_CONTEXT"}, {304, "CUDA_ERROR_OPERATING_SYSTEM"}, {500, "CUDA_ERROR_NOT_FOUND"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"}, {801, "CUDA_ERROR_NOT_SUPPORTED"},
    {807, "CUDA_ERROR_MPS_SERVER_NOT_READY"}, {810, "CUDA_ERROR_MPS_CLIENT_TERMINATED"}, {914, "CUDA_ERROR_INVALID_RESOURCE_TYPE"},
    {915, "CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION"}, {999, "CUDA_ERROR_UNKNOWN"},
};

CUresult cuGetErrorName(CUresult error, const char **name) {
    ENTRY_(0);
    for (size_t i = 0; i < sizeof error_names / sizeof *error_names; i++)
        if (error_names[i].code == (int)error) {
            *name = error_names[i].name;
            return CUDA_SUCCESS;
        }
    *name = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    ENTRY_(0);
    (void)error;
    *text = "an error of the fake driver";
    return CUDA_SUCCESS;
}

/* By this cuda-bindings find all functions: the newest version of a name is the one that it means. */
CUresult cuGetProcAddress_v2(
    const char *symbol, void **function, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *status) {
    ENTRY_(0);
    (void)version, (void)flags;
    char versioned[128];
    Dl_info self;
    dladdr((void *)cuInit, &self);
    void *library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    snprintf(versioned, sizeof versioned, "%s_v2", symbol);
    *function = dlsym(library, versioned);
    if (!*function) *function = dlsym(library, symbol);
    dlclose(library);
    if (status) *status = *function ? 0 : 1;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
