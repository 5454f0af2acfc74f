/* The fake driver: groups of SMs and green contexts. The value of a stream says of which groups it is made. */
#include "state.h"
#include <string.h>

#define GROUP_SMS 8

/* Of 132 SMs 15 groups, as on an H200: 12 are left over. */
static unsigned num_groups(unsigned sms) {
    return sms < 2 * GROUP_SMS ? sms / GROUP_SMS : sms / GROUP_SMS - 1;
}

static CUdevResource resource(unsigned sms, unsigned char group) {
    CUdevResource found;
    memset(&found, 0, sizeof found);
    found.type = CU_DEV_RESOURCE_TYPE_SM;
    found._internal_padding[0] = group; /* 0: the whole device; 1: its first group */
    found.sm.smCount = sms;
    found.sm.minSmPartitionSize = found.sm.smCoscheduledAlignment = GROUP_SMS;
    return found;
}

CUresult cuDeviceGetDevResource(CUdevice device, CUdevResource *found, CUdevResourceType type) {
    ENTRY;
    REQUIRE_DEVICE(device);
    REQUIRE(type == CU_DEV_RESOURCE_TYPE_SM, CUDA_ERROR_INVALID_RESOURCE_TYPE);
    *found = resource((unsigned)num_sms(), 0);
    return CUDA_SUCCESS;
}

CUresult cuDevSmResourceSplitByCount(
    CUdevResource *result, unsigned *count, const CUdevResource *input, CUdevResource *remaining, unsigned flags,
    unsigned least) {
    ENTRY;
    REQUIRE(count && input && input->type == CU_DEV_RESOURCE_TYPE_SM, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(flags == 0 && least == GROUP_SMS && !input->_internal_padding[0], CUDA_ERROR_INVALID_VALUE);
    unsigned all = num_groups(input->sm.smCount);
    REQUIRE(all, CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION);
    if (!result || *count > all) *count = all;
    if (result)
        for (unsigned i = 0; i < *count; i++) result[i] = resource(GROUP_SMS, (unsigned char)(i + 1));
    if (remaining) *remaining = resource(input->sm.smCount - *count * GROUP_SMS, 255);
    return CUDA_SUCCESS;
}

CUresult cuDevResourceGenerateDesc(CUdevResourceDesc *description, CUdevResource *resources, unsigned count) {
    ENTRY;
    uintptr_t mask = 0;
    REQUIRE(description && resources && count, CUDA_ERROR_INVALID_VALUE);
    for (unsigned i = 0; i < count; i++) {
        int group = resources[i]._internal_padding[0] - 1;
        REQUIRE(resources[i].type == CU_DEV_RESOURCE_TYPE_SM, CUDA_ERROR_INVALID_RESOURCE_TYPE);
        REQUIRE(group >= 0 && group < 32 && !(mask >> group & 1), CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION);
        mask |= (uintptr_t)1 << group;
    }
    *description = (CUdevResourceDesc)mask;
    return CUDA_SUCCESS;
}

CUresult cuGreenCtxCreate(CUgreenCtx *context, CUdevResourceDesc description, CUdevice device, unsigned flags) {
    ENTRY;
    REQUIRE_DEVICE(device);
    REQUIRE(description && flags == CU_GREEN_CTX_DEFAULT_STREAM, CUDA_ERROR_INVALID_VALUE);
    devices[device].num_retained++;
    *context = (CUgreenCtx)description;
    return CUDA_SUCCESS;
}

CUresult cuGreenCtxDestroy(CUgreenCtx context) {
    ENTRY;
    REQUIRE(context && devices[0].num_retained, CUDA_ERROR_INVALID_VALUE);
    devices[0].num_retained--;
    return CUDA_SUCCESS;
}

CUresult cuGreenCtxStreamCreate(CUstream *stream, CUgreenCtx context, unsigned flags, int priority) {
    ENTRY;
    (void)priority;
    REQUIRE(context && flags == CU_STREAM_NON_BLOCKING, CUDA_ERROR_INVALID_VALUE);
    *stream = (CUstream)context;
    return CUDA_SUCCESS;
}
