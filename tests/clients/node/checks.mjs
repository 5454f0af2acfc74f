// Runs checks and prints one line for each. What they share with the other clients: the requests and what must come back.
import assert from 'node:assert/strict';
import protobuf from 'protobufjs';

const DETAILS = protobuf.parse(`
  syntax = "proto3";
  package google.rpc;
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message BadRequest {
    message FieldViolation { string field = 1; string description = 2; }
    repeated FieldViolation field_violations = 1;
  }`).root;

export async function check(name, body) {
  try {
    await body();
    console.log(`${name}: ok`);
  } catch (error) {
    console.log(`${name}: FAILED: ${String(error.message ?? error).replaceAll(/\s+/g, ' ').slice(0, 300)}`);
    process.exitCode = 1;
  }
}

/** The field that an INVALID_ARGUMENT names in its google.rpc details. */
export function refusedField(error) {
  const [raw] = error.metadata.get('grpc-status-details-bin');
  const status = DETAILS.lookupType('google.rpc.Status').decode(raw);
  const detail = status.details.find((one) => one.typeUrl.endsWith('google.rpc.BadRequest'));
  return DETAILS.lookupType('google.rpc.BadRequest').decode(detail.value).fieldViolations[0].field;
}

/** The error of a call that must fail. */
export async function failure(promise) {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  return assert.fail('the call succeeded');
}

/** Waits until `condition` holds, for ten seconds at most. */
export async function until(condition) {
  for (let tries = 0; tries < 200; tries += 1) {
    if (await condition()) return;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  assert.fail('the condition does not hold after 10 s');
}
