/* The fake driver: plain allocations, legacy IPC, copies and registered host memory. */
#define _GNU_SOURCE
#include "state.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define IPC_MAGIC 0x4350496475434661ul

typedef struct { unsigned long magic; pid_t pid; int fd; size_t size; CUuuid uuid; } IpcContent;

/* Adds a range over the memfd and makes it accessible. On an error the caller still owns `fd`. */
static CUresult add_plain(CUdeviceptr *address, Range values) {
    values.address = reserve(values.size);
    REQUIRE(values.address, CUDA_ERROR_OUT_OF_MEMORY);
    Range *range = add_range(values);
    CUresult error = map_memory(range, values.fd, values.size);
    if (error) {
        munmap(range->address, range->size);
        remove_range(range);
        return error;
    }
    grant_access(range);
    *address = (CUdeviceptr)range->address;
    return CUDA_SUCCESS;
}

static void remove_plain(Range *range) {
    munmap(range->hidden, range->size);
    munmap(range->address, range->size);
    close(range->fd);
    remove_range(range);
}

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t size) {
    ENTRY;
    int device = current_device();
    REQUIRE(device >= 0, CUDA_ERROR_INVALID_CONTEXT);
    REQUIRE(size, CUDA_ERROR_INVALID_VALUE);
    size = (size + GRANULARITY - 1) & ~(GRANULARITY - 1);
    REQUIRE(size <= device_bytes - used_bytes, CUDA_ERROR_OUT_OF_MEMORY);
    int fd = new_memfd(device, size);
    REQUIRE(fd >= 0, CUDA_ERROR_OUT_OF_MEMORY);
    Range values = {.kind = PLAIN, .size = size, .device = device, .fd = fd, .owner = getpid()};
    CUresult error = add_plain(address, values);
    if (error) close(fd);
    else used_bytes += size;
    return error;
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    ENTRY;
    Range *range = find_range(address);
    REQUIRE(current_device() >= 0, CUDA_ERROR_INVALID_CONTEXT);
    REQUIRE(range && range->kind == PLAIN && range->address == (char *)address, CUDA_ERROR_INVALID_VALUE);
    used_bytes -= range->size;
    remove_plain(range);
    return CUDA_SUCCESS;
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr address) {
    ENTRY;
    Range *range = find_range(address);
    REQUIRE(current_device() >= 0, CUDA_ERROR_INVALID_CONTEXT);
    REQUIRE(range && range->hidden, CUDA_ERROR_NOT_FOUND);
    *base = (CUdeviceptr)range->address;
    *size = range->size;
    return CUDA_SUCCESS;
}

CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr address) {
    ENTRY;
    Range *range = find_range(address);
    REQUIRE(range && range->kind == PLAIN, CUDA_ERROR_INVALID_VALUE);
    IpcContent content = {IPC_MAGIC, getpid(), range->fd, range->size, devices[range->device].uuid};
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &content, sizeof content);
    return CUDA_SUCCESS;
}

/* A handle that is open already is opened once more, at the same address. */
CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *address, CUipcMemHandle handle, unsigned flags) {
    ENTRY;
    IpcContent content;
    char path[64];
    memcpy(&content, &handle, sizeof content);
    int device = current_device();
    REQUIRE(device >= 0, CUDA_ERROR_INVALID_CONTEXT);
    REQUIRE(flags == CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS && content.magic == IPC_MAGIC, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(content.pid != getpid(), CUDA_ERROR_INVALID_CONTEXT);
    REQUIRE(!memcmp(&content.uuid, &devices[device].uuid, sizeof content.uuid), CUDA_ERROR_INVALID_DEVICE);
    snprintf(path, sizeof path, "/proc/%d/fd/%d", content.pid, content.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    REQUIRE(fd >= 0, CUDA_ERROR_INVALID_VALUE);
    struct stat opened, known;
    fstat(fd, &opened);
    for (Range *range = ranges; range; range = range->next)
        if (range->kind == IPC && !fstat(range->fd, &known) && known.st_ino == opened.st_ino) {
            close(fd);
            range->num_opened++;
            *address = (CUdeviceptr)range->address;
            return CUDA_SUCCESS;
        }
    CUresult error = add_plain(address, (Range){.kind = IPC, .size = content.size, .device = device, .fd = fd,
                                                .num_opened = 1, .owner = content.pid});
    if (error) close(fd);
    return error;
}

CUresult cuIpcCloseMemHandle(CUdeviceptr address) {
    ENTRY;
    Range *range = find_range(address);
    REQUIRE(range && range->kind == IPC && range->address == (char *)address, CUDA_ERROR_INVALID_VALUE);
    if (!--range->num_opened) remove_plain(range);
    return CUDA_SUCCESS;
}

/* Where the bytes of a device address are. Memory of legacy IPC dies with its owner. */
static CUresult find_bytes(char **bytes, CUdeviceptr address, size_t size) {
    Range *range = find_range(address);
    REQUIRE(current_device() >= 0, CUDA_ERROR_INVALID_CONTEXT);
    REQUIRE(range && range->hidden && range->can_access, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(size <= range->size - (size_t)((char *)address - range->address), CUDA_ERROR_INVALID_VALUE);
    REQUIRE(range->kind != IPC || !kill(range->owner, 0) || errno != ESRCH, CUDA_ERROR_ILLEGAL_ADDRESS);
    *bytes = range->hidden + ((char *)address - range->address);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr destination, const void *source, size_t size) {
    ENTRY;
    char *bytes;
    CUresult error = find_bytes(&bytes, destination, size);
    if (!error) memcpy(bytes, source, size);
    return error;
}

CUresult cuMemcpyDtoH_v2(void *destination, CUdeviceptr source, size_t size) {
    ENTRY;
    char *bytes;
    CUresult error = find_bytes(&bytes, source, size);
    if (!error) memcpy(destination, bytes, size);
    return error;
}

static Range *find_registered(const char *address, size_t size) {
    Range *range = ranges;
    while (range && !(range->kind == HOST && address < range->address + range->size && range->address < address + size))
        range = range->next;
    return range;
}

CUresult cuMemHostRegister_v2(void *address, size_t size, unsigned flags) {
    ENTRY;
    unsigned char *pages = malloc(size / 4096 + 2);
    uintptr_t start = (uintptr_t)address & ~4095ul;
    int is_mapped = size && !mincore((void *)start, (uintptr_t)address + size - start, pages);
    free(pages);
    REQUIRE(current_device() >= 0, CUDA_ERROR_INVALID_CONTEXT);
    REQUIRE(is_mapped && flags < 16, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(!find_registered(address, size), CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
    add_range((Range){.kind = HOST, .address = address, .size = size, .fd = -1});
    return CUDA_SUCCESS;
}

CUresult cuMemHostUnregister(void *address) {
    ENTRY;
    Range *range = find_registered(address, 1);
    REQUIRE(current_device() >= 0, CUDA_ERROR_INVALID_CONTEXT);
    REQUIRE(range && range->address == address, CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    remove_range(range);
    return CUDA_SUCCESS;
}
