// @grpc/grpc-js with @grpc/proto-loader: messages are plain objects, read from the proto files at run time.
import assert from 'node:assert/strict';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';
import { check, failure, refusedField, until } from './checks.mjs';

const [address, protos] = process.argv.slice(2);
const definition = protoLoader.loadSync(['muxmesh/v1/inference.proto', 'muxmesh/v1/mesh.proto'], {
  includeDirs: [protos], keepCase: true, longs: String, enums: String, defaults: true, oneofs: true,
});
const { Inference, Mesh } = grpc.loadPackageDefinition(definition).muxmesh.v1;
const inference = new Inference(address, grpc.credentials.createInsecure());
const mesh = new Mesh(address, grpc.credentials.createInsecure());

const call = (client, method, request) =>
  new Promise((resolve, reject) => {
    client[method](request, (error, response) => (error ? reject(error) : resolve(response)));
  });

async function stream(request, options = {}, onMessage = () => {}) {
  const responses = [];
  const reading = inference.GenerateStream(request, options);
  for await (const response of reading) {
    responses.push(response);
    onMessage(reading);
  }
  return responses;
}

const stopping = { max_new_tokens: 8, ignore_eos: true };
const textOf = (responses) => responses.map((response) => response.outputs.text).join('');

await check('list models', async () => {
  const { models } = await call(mesh, 'ListModels', {});
  assert.deepEqual(models.map((model) => model.name).sort(), ['sim', 'slow', 'tiny']);
  assert.ok(models.every((model) => model.vocab_size === 259));
});

await check('generate', async () => {
  const response = await call(inference, 'Generate', { model: 'sim', text: 'Hello', stopping });
  assert.equal(response.outputs.num_tokens, 8);
  assert.equal(response.outputs.finish_info.finish_reason, 'LENGTH');
  assert.equal(response.prompt_info.num_prompt_tokens, 5);
});

await check('stream', async () => {
  const request = {
    model: 'sim', text: 'Hello', stopping, sampling: { seed: '7' }, response: { output_token_ids: true },
  };
  const responses = await stream(request);
  const whole = await call(inference, 'Generate', request);
  assert.equal(textOf(responses), whole.outputs.text);
  assert.deepEqual(responses.flatMap((response) => response.outputs.token_ids), whole.outputs.token_ids);
  assert.equal(whole.outputs.token_ids.length, 8);
});

await check('chat', async () => {
  const messages = [{ role: 'system', content: 'Be brief.' }, { role: 'user', content: 'Héllo' }];
  const response = await call(inference, 'Generate', { model: 'tiny', chat: { messages }, stopping });
  assert.equal(response.outputs.num_tokens, 8);
});

await check('seed', async () => {
  const request = { model: 'tiny', text: 'a', temperature: 1, stopping };
  const largest = '9223372036854775807';
  const given = await call(inference, 'Generate', { ...request, sampling: { seed: largest } });
  assert.equal(given.prompt_info.seed, largest);
  const drawn = await call(inference, 'Generate', request);
  const seed = Number(drawn.prompt_info.seed);
  assert.ok(Number.isSafeInteger(seed) && String(seed) === drawn.prompt_info.seed);
  const again = await call(inference, 'Generate', { ...request, sampling: { seed } });
  assert.equal(again.outputs.text, drawn.outputs.text);
});

await check('log-probabilities', async () => {
  const response = {
    output_token_ids: true, prompt_token_ids: true, output_logprobs: true, output_candidates: { top_n: 2 },
    prompt_logprobs: true,
  };
  const whole = await call(inference, 'Generate', { model: 'tiny', text: 'abc', temperature: 0, stopping, response });
  const { outputs, prompt_info: prompt } = whole;
  for (const columns of [outputs, prompt]) {
    for (const name of ['logprobs', 'ranks', 'candidate_tokens', 'token_texts', 'token_bytes']) {
      assert.equal(columns[name].length, columns.token_ids.length, name);
    }
  }
  assert.ok(outputs.logprobs.every((logprob) => logprob <= 0) && outputs.ranks.every((rank) => rank === 1));
  assert.ok(outputs.candidate_tokens.every(({ tokens }) => tokens.length === 1 && tokens[0].rank === 2));
  assert.equal(prompt.token_texts.join(''), 'abc');
});

await check('tokenize', async () => {
  const tokenized = await call(inference, 'Tokenize', { model: 'sim', text: 'héllo', token_texts: true });
  assert.equal(tokenized.num_tokens, 6);
  assert.equal(Buffer.concat(tokenized.token_bytes).toString(), 'héllo');
  const { text } = await call(inference, 'Detokenize', { model: 'sim', token_ids: tokenized.token_ids });
  assert.equal(text, 'héllo');
});

await check('refusal', async () => {
  const error = await failure(call(inference, 'Generate', { model: 'sim', text: 'a', sampling: { top_p: 0 } }));
  assert.equal(error.code, grpc.status.INVALID_ARGUMENT);
  assert.equal(refusedField(error), 'sampling.top_p');
});

const long = { model: 'slow', text: 'a', stopping: { max_new_tokens: 2000, ignore_eos: true } };
const isIdle = async () => {
  const { models } = await call(mesh, 'GetStatus', {});
  return models.find((model) => model.model === 'slow').num_requests_running === 0;
};

await check('cancel', async () => {
  const error = await failure(stream(long, {}, (reading) => reading.cancel()));
  assert.equal(error.code, grpc.status.CANCELLED);
  await until(isIdle);
});

await check('deadline', async () => {
  const error = await failure(stream(long, { deadline: Date.now() + 300 }));
  assert.equal(error.code, grpc.status.DEADLINE_EXCEEDED);
  await until(isIdle);
});

inference.close();
mesh.close();
