import type { ServiceError } from '@grpc/grpc-js';

export function check(name: string, body: () => Promise<void>): Promise<void>;
export function refusedField(error: ServiceError): string;
export function failure(promise: Promise<unknown>): Promise<ServiceError>;
export function until(condition: () => Promise<boolean>): Promise<void>;
