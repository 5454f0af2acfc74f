// Stubs that ts-proto generates for @grpc/grpc-js, compiled by tsc in strict mode. 64-bit integers are numbers there: a
// value that a double cannot hold makes the generated code throw.
import assert from 'node:assert/strict';
import { type CallOptions, type ClientReadableStream, credentials, type ServiceError, status } from '@grpc/grpc-js';
import { check, failure, refusedField, until } from './checks.mjs';
import {
  ChatMessage, DetokenizeRequest, FinishInfo_FinishReason, GenerateRequest, type GenerateResponse, InferenceClient,
  ResponseOptions, SamplingOptions, StoppingOptions, TokenizeRequest,
} from './gen/muxmesh/v1/inference.js';
import { GetStatusRequest, ListModelsRequest, MeshClient } from './gen/muxmesh/v1/mesh.js';

const address = process.argv[2]!;
const inference = new InferenceClient(address, credentials.createInsecure());
const mesh = new MeshClient(address, credentials.createInsecure());

type Done<T> = (error: ServiceError | null, response: T) => void;
const call = <T>(start: (done: Done<T>) => unknown): Promise<T> =>
  new Promise((resolve, reject) => {
    start((error, response) => (error ? reject(error) : resolve(response)));
  });
const generate = (request: GenerateRequest) => call<GenerateResponse>((done) => inference.generate(request, done));

async function stream(
  request: GenerateRequest, options: Partial<CallOptions> = {},
  onMessage: (reading: ClientReadableStream<GenerateResponse>) => void = () => {},
): Promise<GenerateResponse[]> {
  const responses: GenerateResponse[] = [];
  const reading = inference.generateStream(request, options);
  for await (const response of reading) {
    responses.push(response as GenerateResponse);
    onMessage(reading);
  }
  return responses;
}

const stopping = StoppingOptions.fromPartial({ maxNewTokens: 8, ignoreEos: true });

await check('list models', async () => {
  const { models } = await call((done: Done<{ models: { name: string; vocabSize: number }[] }>) =>
    mesh.listModels(ListModelsRequest.create(), done));
  assert.deepEqual(models.map((model) => model.name).sort(), ['sim', 'slow', 'tiny']);
  assert.ok(models.every((model) => model.vocabSize === 259));
});

await check('generate', async () => {
  const response = await generate(GenerateRequest.fromPartial({ model: 'sim', text: 'Hello', stopping }));
  assert.equal(response.outputs?.numTokens, 8);
  assert.equal(response.outputs?.finishInfo?.finishReason, FinishInfo_FinishReason.LENGTH);
  assert.equal(response.promptInfo?.numPromptTokens, 5);
});

await check('stream', async () => {
  const request = GenerateRequest.fromPartial({
    model: 'sim', text: 'Hello', stopping, sampling: { seed: 7 }, response: { outputTokenIds: true },
  });
  const responses = await stream(request);
  const whole = await generate(request);
  assert.equal(responses.map((response) => response.outputs?.text).join(''), whole.outputs?.text);
  assert.deepEqual(responses.flatMap((response) => response.outputs?.tokenIds ?? []), whole.outputs?.tokenIds);
  assert.equal(whole.outputs?.tokenIds.length, 8);
});

await check('chat', async () => {
  const messages = [
    ChatMessage.create({ role: 'system', content: 'Be brief.' }), ChatMessage.create({ role: 'user', content: 'Héllo' }),
  ];
  const response = await generate(GenerateRequest.fromPartial({ model: 'tiny', chat: { messages }, stopping }));
  assert.equal(response.outputs?.numTokens, 8);
});

await check('seed', async () => {
  const request = { model: 'tiny', text: 'a', temperature: 1, stopping };
  const given = await generate(
    GenerateRequest.fromPartial({ ...request, sampling: { seed: Number.MAX_SAFE_INTEGER } }));
  assert.equal(given.promptInfo?.seed, Number.MAX_SAFE_INTEGER);
  const drawn = await generate(GenerateRequest.fromPartial(request));
  const seed = drawn.promptInfo?.seed;
  assert.ok(seed !== undefined && Number.isSafeInteger(seed));
  const again = await generate(GenerateRequest.fromPartial({ ...request, sampling: { seed } }));
  assert.equal(again.outputs?.text, drawn.outputs?.text);
});

await check('log-probabilities', async () => {
  const response = ResponseOptions.fromPartial({
    outputTokenIds: true, promptTokenIds: true, outputLogprobs: true, outputCandidates: { topN: 2 },
    promptLogprobs: true,
  });
  const whole = await generate(
    GenerateRequest.fromPartial({ model: 'tiny', text: 'abc', temperature: 0, stopping, response }));
  const { outputs, promptInfo: prompt } = whole;
  assert.ok(outputs && prompt);
  for (const columns of [outputs, prompt]) {
    for (const name of ['logprobs', 'ranks', 'candidateTokens', 'tokenTexts', 'tokenBytes'] as const) {
      assert.equal(columns[name].length, columns.tokenIds.length, name);
    }
  }
  assert.ok(outputs.logprobs.every((logprob) => logprob <= 0) && outputs.ranks.every((rank) => rank === 1));
  assert.ok(outputs.candidateTokens.every(({ tokens }) => tokens.length === 1 && tokens[0]?.rank === 2));
  assert.equal(prompt.tokenTexts.join(''), 'abc');
});

await check('tokenize', async () => {
  const request = TokenizeRequest.fromPartial({ model: 'sim', text: 'héllo', tokenTexts: true });
  const tokenized = await call((done: Done<{ tokenIds: number[]; tokenBytes: Uint8Array[] }>) =>
    inference.tokenize(request, done));
  assert.equal(tokenized.tokenIds.length, 6);
  assert.equal(Buffer.concat(tokenized.tokenBytes).toString(), 'héllo');
  const { text } = await call((done: Done<{ text: string }>) =>
    inference.detokenize(DetokenizeRequest.fromPartial({ model: 'sim', tokenIds: tokenized.tokenIds }), done));
  assert.equal(text, 'héllo');
});

await check('refusal', async () => {
  const sampling = SamplingOptions.fromPartial({ topP: 0 });
  const error = await failure(generate(GenerateRequest.fromPartial({ model: 'sim', text: 'a', sampling })));
  assert.equal(error.code, status.INVALID_ARGUMENT);
  assert.equal(refusedField(error), 'sampling.top_p');
});

const long = GenerateRequest.fromPartial({
  model: 'slow', text: 'a', stopping: { maxNewTokens: 2000, ignoreEos: true },
});
const isIdle = async () => {
  const { models } = await call((done: Done<{ models: { model: string; numRequestsRunning: number }[] }>) =>
    mesh.getStatus(GetStatusRequest.create(), done));
  return models.find((model) => model.model === 'slow')?.numRequestsRunning === 0;
};

await check('cancel', async () => {
  const error = await failure(stream(long, {}, (reading) => reading.cancel()));
  assert.equal(error.code, status.CANCELLED);
  await until(isIdle);
});

await check('deadline', async () => {
  const error = await failure(stream(long, { deadline: Date.now() + 300 }));
  assert.equal(error.code, status.DEADLINE_EXCEEDED);
  await until(isIdle);
});

inference.close();
mesh.close();
